"""A Source of documents in files, local or remote.

A document is held out for validation if the first 8 bytes of its text's sha256, read as a fraction, are below
`validation_fraction`, whatever other documents there are.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from relora_jax.data import formats, patterns
from relora_jax.data.formats import Document
from relora_jax.data.source import BLOCK_DOCUMENTS, CHUNK_DOCUMENTS, BadDocumentError, Chunk, Stripe

PARTS = ("train", "validation")
FINGERPRINT_BYTES = 2**16


@dataclasses.dataclass(frozen=True)
class Files:
    """A Source of both parts: the documents of files, in the order of their paths."""

    paths: tuple[patterns.TextFile, ...]
    field: str
    validation_fraction: float
    skip_bad_documents: bool = False
    block_documents: int = BLOCK_DOCUMENTS
    unit = "B"

    @property
    def name(self) -> str:
        """The first path, and how many more there are."""
        first, *more = self.paths
        return f"{first} and {len(more)} more" if more else str(first)

    @property
    def files(self) -> int:
        """Number of files."""
        return len(self.paths)

    @property
    def documents(self) -> int | None:
        """Number of documents: one per file if all are .txt, otherwise unknown."""
        kinds = {formats.file_type(path.name)[0] for path in self.paths}
        return len(self.paths) if kinds == {".txt"} else None

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def size(self) -> int:
        """Total size in bytes, for progress."""
        return self.bytes

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and first and last 64 KiB; it does not depend on their folder."""
        digest = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(os.fsencode(path.name) + f" {size} ".encode())
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(file.read(FINGERPRINT_BYTES))
        return digest.hexdigest()

    def stripes(self, workers: int) -> list[Stripe]:
        """One stripe per file; if workers outnumber files, several share a file, each with its own blocks.

        A compressed or remote file has a single reader, as each would have to decompress or fetch all of it.
        """
        shares = -(-workers // len(self.paths))
        alone = [formats.file_type(path.name)[1] or not isinstance(path, Path) for path in self.paths]
        steps = [1 if single else shares for single in alone]
        return [Stripe(file, first, step) for file, step in enumerate(steps) for first in range(step)]

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """The blocks of a file; documents of a block that is not consumed are read but not decoded.

        If bad documents are skipped, all are decoded: a block has as many good ones as without them.
        """
        path = self.paths[file]
        with path.open("rb") as raw:
            documents: Iterator[Any] = formats.documents(path, raw, self.field)
            if self.skip_bad_documents:
                documents = _tried(documents)
            start = 0
            while (first := next(documents, None)) is not None:
                block = _block(itertools.chain([first], documents), self.block_documents)
                yield _chunks(block, start, raw.tell)
                deque(block, maxlen=0)
                start = raw.tell()

    def part(self, text: str) -> int:
        """1 if the text is held out for validation, else 0."""
        first = hashlib.sha256(text.encode()).digest()[:8]
        return int(int.from_bytes(first, "big") < self.validation_fraction * 2**64)

    def train_texts(self) -> Iterator[str]:
        """The documents of part 0, in order."""
        for file in range(len(self.paths)):
            with contextlib.closing(self.blocks(file)) as blocks:
                documents = (t for chunks in blocks for chunk in chunks for t in chunk.texts)
                yield from (t for t in documents if not self.part(t))


def find(
    pattern: str,
    *,
    field: str,
    validation_fraction: float,
    skip_bad_documents: bool = False,
    setting: str = "data.text",
) -> Files:
    """The files of a pattern (patterns.py); errors name `setting`."""
    paths = tuple(patterns.matching(pattern, setting=setting))
    return Files(paths, field, validation_fraction, skip_bad_documents)


def _tried(documents: Iterator[Document]) -> Iterator[str | BadDocumentError]:
    """The text of each document, or its error."""
    for decode in documents:
        try:
            yield decode()
        except BadDocumentError as error:
            yield error


def _block(documents: Iterator[Any], count: int) -> Iterator[Any]:
    """The next `count` documents, and the bad ones before them."""
    for document in documents:
        yield document
        count -= not isinstance(document, BadDocumentError)
        if not count:
            return


def _chunks(block: Iterator[Any], start: int, position: Callable[[], int]) -> Iterator[Chunk]:
    while documents := list(itertools.islice(block, CHUNK_DOCUMENTS)):
        good = [document for document in documents if not isinstance(document, BadDocumentError)]
        bad = [document.problem for document in documents if isinstance(document, BadDocumentError)]
        texts = [document if isinstance(document, str) else document() for document in good]
        yield Chunk(texts, (end := position()) - start, bad)
        start = end
