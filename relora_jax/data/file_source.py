"""Streams documents from local files: JSON lines, plain text, Parquet.

.jsonl and .json (one object per line, the text in one field) and .txt (one document) may be compressed as
.gz or .zst; .parquet has the text in a column. A document is held out for validation if the first 8 bytes of
its text's sha256, read as a fraction, are below `validation_fraction`, whatever other documents there are.
"""

import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import itertools
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from relora_jax.data import json_lines
from relora_jax.data.source import BLOCK_DOCUMENTS, CHUNK_DOCUMENTS, Chunk, Stripe
from relora_jax.errors import UserError

PARTS = ("train", "validation")
ENDINGS = (".jsonl", ".json", ".txt", ".parquet")
COMPRESSED = (".gz", ".zst")
FINGERPRINT_BYTES = 2**16
_Document = Callable[[], str]  # decodes the text, so that skipped documents are not decoded


@dataclasses.dataclass(frozen=True)
class Files:
    """A Source of both parts: the documents of files, in the order of their paths."""

    paths: tuple[Path, ...]
    field: str
    validation_fraction: float
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
        return len(self.paths) if all(_file_type(path) == ".txt" for path in self.paths) else None

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
                digest.update(f"{path.name} {size} ".encode())
                digest.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(0, size - FINGERPRINT_BYTES))
                digest.update(file.read(FINGERPRINT_BYTES))
        return digest.hexdigest()

    def stripes(self, workers: int) -> list[Stripe]:
        """One stripe per file; if workers outnumber files, several share a file, each with its own blocks.

        A compressed file has a single reader, as each reader would have to decompress all of it.
        """
        shares = -(-workers // len(self.paths))
        steps = [1 if path.suffix in COMPRESSED else shares for path in self.paths]
        return [Stripe(file, first, step) for file, step in enumerate(steps) for first in range(step)]

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """The blocks of a file; documents of a block that is not consumed are read but not decoded."""
        path = self.paths[file]
        with path.open("rb") as raw:
            position = raw.tell
            if path.suffix == ".parquet":
                documents = _parquet(path, raw, self.field)
            else:
                stream = _decompressed(path, raw)
                is_text = _file_type(path) == ".txt"
                documents = _whole(path, stream) if is_text else _json_lines(path, stream, self.field)
            while (first := next(documents, None)) is not None:
                block = itertools.islice(itertools.chain([first], documents), self.block_documents)
                yield _chunks(block, position)
                deque(block, maxlen=0)

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


class NoFilesError(UserError):
    """No file matches the pattern."""


def find(pattern: str, *, field: str, validation_fraction: float, setting: str = "data.text") -> Files:
    """The files that a glob pattern (** for nested folders, ~ for home) matches, sorted by path.

    NoFilesError if there are none, UserError for an unsupported file type; both name `setting`.
    """
    matches = {Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)}
    paths = sorted(path for path in matches if path.is_file())
    if not paths:
        raise NoFilesError(
            f"{setting} {pattern!r} matches no file (working directory {os.getcwd()}): quote the pattern, "
            "and use ** for nested folders"
        )
    for path in paths:
        if _file_type(path) not in ENDINGS or path.name.endswith((".parquet.gz", ".parquet.zst")):
            raise UserError(
                f"{path} of {setting} {pattern!r} has an unsupported file type: use {', '.join(ENDINGS)} "
                "(the first three also with .gz or .zst)"
            )
    for path in [path for path in paths if path.suffix in (".parquet", ".zst")]:
        _arrow(path)  # report a missing package before hours of work
        break
    return Files(tuple(paths), field, validation_fraction)


def _file_type(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _chunks(block: Iterable[_Document], position: Callable[[], int]) -> Iterator[Chunk]:
    start = position()
    remaining = iter(block)
    while documents := list(itertools.islice(remaining, CHUNK_DOCUMENTS)):
        yield Chunk([decode() for decode in documents], (end := position()) - start)
        start = end


def _arrow(path: Path) -> Any:
    """The package pyarrow, which reads Parquet, and detects truncated .zst files."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} requires pyarrow: pip install 'relora-jax[arrow]'") from None
    return pyarrow


def _decompressed(path: Path, raw: io.BufferedReader) -> io.BufferedIOBase:
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_arrow(path).CompressedInputStream(raw, "zstd"), 2**17)
    return raw


def _json_lines(path: Path, stream: io.BufferedIOBase, field: str) -> Iterator[_Document]:
    try:
        for number, line in json_lines.lines(stream):
            yield partial(_json_text, f"{path}, line {number}", line, field)
    except json_lines.Damaged as error:
        raise UserError(f"{path} is damaged at line {error.line} ({error}): copy it again") from error


def _json_text(location: str, line: bytes, field: str) -> str:
    try:
        record = json_lines.parse(line)
    except json_lines.Broken as error:
        raise UserError(f"{location} is {error}: each line must be one JSON object in UTF-8") from error
    if field not in record:
        fields = ", ".join(record) or "none"
        raise UserError(f"{location} has no field {field!r}: set data.text_field to one of {fields}")
    return _string(location, lambda: record[field], field)


def _whole(path: Path, stream: io.BufferedIOBase) -> Iterator[_Document]:
    try:
        content = stream.read()
    except json_lines.DAMAGE as error:
        if json_lines.disk_failed(error):
            raise
        raise UserError(f"{path} is damaged ({error}): copy it again") from error
    yield lambda: _utf8(str(path), content.removeprefix(json_lines.BOM))


def _parquet(path: Path, raw: io.BufferedReader, field: str) -> Iterator[_Document]:
    arrow = _arrow(path)
    try:
        file = arrow.parquet.ParquetFile(raw)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error
    if field not in file.schema_arrow.names:
        columns = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column {field!r}: set data.text_field to one of {columns}")
    batches, number = file.iter_batches(batch_size=CHUNK_DOCUMENTS, columns=[field]), 0
    while True:
        try:
            batch = next(batches, None)
        except (arrow.ArrowException, OSError) as error:
            raise _damaged_parquet(path, error) from error
        if batch is None:
            return
        for value in batch.column(0):
            number += 1
            yield partial(_string, f"{path}, row {number}", value.as_py, field)


def _damaged_parquet(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as Parquet ({error}): copy it again")


def _string(location: str, read: Callable[[], Any], field: str) -> str:
    try:
        value = read()
        if not isinstance(value, str):
            raise UserError(f"{location}: {field!r} is {type(value).__name__}, not text: set data.text_field")
        value.encode()  # fails on a lone surrogate, which JSON can spell
    except UnicodeError as error:
        raise _not_utf8(location, error) from error
    return value


def _utf8(location: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(location, error) from error


def _not_utf8(location: str, error: UnicodeError) -> UserError:
    reason, start = getattr(error, "reason", error), getattr(error, "start", 0)
    return UserError(f"{location} is not UTF-8 ({reason} at byte {start}): convert it")
