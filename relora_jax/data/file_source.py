"""Documents of one's own files, streamed: JSON lines, text, Parquet.

.jsonl and .json (one object a line, the text in one field) and .txt (one document) may be compressed as .gz
or .zst; .parquet has the text in a column. A document is held out for validation where the first 8 bytes of
its text's sha256, read as a fraction, lie below `validation_fraction`: no other document decides that.
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
_BOM = b"\xef\xbb\xbf"
_Document = Callable[[], str]  # decodes it: one that is skipped never is


@dataclasses.dataclass(frozen=True)
class Files:
    """The documents of files, in the order of their paths; a source of blocks for both parts."""

    paths: tuple[Path, ...]
    field: str
    validation_fraction: float
    block_documents: int = BLOCK_DOCUMENTS
    unit = "B"

    @property
    def name(self) -> str:
        """The files, shortly."""
        first, *more = self.paths
        return f"{first} and {len(more)} more" if more else str(first)

    @property
    def files(self) -> int:
        """How many there are."""
        return len(self.paths)

    @property
    def documents(self) -> int | None:
        """One a file, where all are .txt; of others only reading tells."""
        return len(self.paths) if all(_kind(path) == ".txt" for path in self.paths) else None

    @property
    def bytes(self) -> int:
        """The size of the files."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.bytes

    def fingerprint(self) -> str:
        """The same for the same files wherever they lie: names, sizes, their first and last 64 KiB."""
        known = hashlib.sha256()
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                known.update(f"{path.name} {size} ".encode())
                known.update(file.read(FINGERPRINT_BYTES))
                file.seek(max(0, size - FINGERPRINT_BYTES))
                known.update(file.read(FINGERPRINT_BYTES))
        return known.hexdigest()

    def stripes(self, workers: int) -> list[Stripe]:
        """A file each; where workers outnumber files several read one, each encoding its share of blocks.

        A compressed file has one reader: what the others would read over, each of them would decompress.
        """
        shares = -(-workers // len(self.paths))
        steps = [1 if path.suffix in COMPRESSED else shares for path in self.paths]
        return [Stripe(file, first, step) for file, step in enumerate(steps) for first in range(step)]

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """The blocks of a file; what is not asked for is read over, not decoded."""
        path = self.paths[file]
        with path.open("rb") as raw:
            position = raw.tell
            if path.suffix == ".parquet":
                documents = _parquet(path, raw, self.field)
            else:
                stream = _decompressed(path, raw)
                lines = _kind(path) != ".txt"
                documents = _json_lines(path, stream, self.field) if lines else _whole(path, stream)
            while (first := next(documents, None)) is not None:
                block = itertools.islice(itertools.chain([first], documents), self.block_documents)
                yield _chunks(block, position)
                deque(block, maxlen=0)

    def part(self, text: str) -> int:
        """1 where the text is held out."""
        first = hashlib.sha256(text.encode()).digest()[:8]
        return int(int.from_bytes(first, "big") < self.validation_fraction * 2**64)

    def train_texts(self) -> Iterator[str]:
        """The documents of part 0, in order."""
        for file in range(len(self.paths)):
            with contextlib.closing(self.blocks(file)) as blocks:
                documents = (t for chunks in blocks for chunk in chunks for t in chunk.texts)
                yield from (t for t in documents if not self.part(t))


class AbsentError(UserError):
    """No file is where the text should be."""


def find(pattern: str, *, field: str, validation_fraction: float, setting: str = "data.text") -> Files:
    """The files that a glob pattern (** for any folders, ~ for home) matches, by path; `setting` has it.

    AbsentError where there are none, UserError where one is of an unknown kind.
    """
    found = {Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True)}
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise AbsentError(
            f"{setting} {pattern!r} matches no file (from {os.getcwd()}): quote it, write ** for any folders"
        )
    for path in paths:
        if _kind(path) not in ENDINGS or path.name.endswith((".parquet.gz", ".parquet.zst")):
            raise UserError(
                f"{path} of {setting} {pattern!r} is of no known kind: write a pattern for "
                f"{', '.join(ENDINGS)}, the first three also with .gz or .zst"
            )
    for path in [path for path in paths if path.suffix in (".parquet", ".zst")]:
        _arrow(path)  # a missing package shows before hours of work
        break
    return Files(tuple(paths), field, validation_fraction)


def _kind(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in COMPRESSED else path).suffix


def _chunks(block: Iterable[_Document], position: Callable[[], int]) -> Iterator[Chunk]:
    before = position()
    left = iter(block)
    while documents := list(itertools.islice(left, CHUNK_DOCUMENTS)):
        yield Chunk([decode() for decode in documents], (now := position()) - before)
        before = now


def _arrow(path: Path) -> Any:
    """The package pyarrow, which reads Parquet, and notices a .zst file that ends too early."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} is read by pyarrow: pip install 'relora-jax[arrow]'") from None
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


def _json_text(place: str, line: bytes, field: str) -> str:
    try:
        found = json_lines.parse(line)
    except json_lines.Broken as error:
        raise UserError(f"{place} is {error}: one JSON object in UTF-8 a line is read") from error
    if field not in found:
        there = ", ".join(found) or "none"
        raise UserError(f"{place} has no field {field!r}: set data.text_field to one of its own ({there})")
    return _string(place, lambda: found[field], field)


def _whole(path: Path, stream: io.BufferedIOBase) -> Iterator[_Document]:
    try:
        content = stream.read()
    except json_lines.DAMAGE as error:
        if json_lines.disk_failed(error):
            raise
        raise UserError(f"{path} is damaged ({error}): copy it again") from error
    yield lambda: _utf8(str(path), content.removeprefix(_BOM))


def _parquet(path: Path, raw: io.BufferedReader, field: str) -> Iterator[_Document]:
    arrow = _arrow(path)
    try:
        file = arrow.parquet.ParquetFile(raw)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error
    if field not in file.schema_arrow.names:
        there = ", ".join(file.schema_arrow.names)
        raise UserError(f"{path} has no column {field!r}: set data.text_field to one of its own ({there})")
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


def _string(place: str, read: Callable[[], Any], field: str) -> str:
    try:
        value = read()
        if not isinstance(value, str):
            raise UserError(f"{place}: {field!r} is no text but {type(value).__name__}; see data.text_field")
        value.encode()  # not so where JSON spells half of a surrogate pair
    except UnicodeError as error:
        raise _not_utf8(place, error) from error
    return value


def _utf8(place: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(place, error) from error


def _not_utf8(place: str, error: UnicodeError) -> UserError:
    at = getattr(error, "start", 0)
    return UserError(f"{place} is not UTF-8 ({getattr(error, 'reason', error)} at byte {at}): convert it")
