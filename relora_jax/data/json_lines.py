"""JSON lines, one object in UTF-8 a line: read here by all, and what is wrong with one told in its place."""

import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

LONGEST_LINE = 2**26  # bytes; a longer one counts as broken, so that memory is bounded
DAMAGE = (EOFError, OSError, zlib.error)  # of gzip and pyarrow; an OSError of theirs has no errno
_BOM = b"\xef\xbb\xbf"


class Broken(Exception):  # noqa: N818
    """What a line is, in words that follow "is"."""


class Damaged(Exception):  # noqa: N818
    """The stream ends too early, or cannot be decompressed, at `line`."""

    def __init__(self, line: int, error: Exception) -> None:
        super().__init__(str(error))
        self.line = line


def lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each line that is not empty; the beginning of one that is too long.

    Damaged where the stream is; OSError where the disk fails.
    """
    number, whole = 0, True
    while line := _read(stream, number + whole):
        begins, whole = whole, line.endswith(b"\n")
        if begins:
            number += 1
            if number == 1:
                line = line.removeprefix(_BOM)
            if line.strip():
                yield number, line


def _read(stream: io.BufferedIOBase, number: int) -> bytes:
    try:
        return stream.readline(LONGEST_LINE)
    except DAMAGE as error:
        if disk_failed(error):
            raise
        raise Damaged(number, error) from error


def disk_failed(error: BaseException) -> bool:
    """Whether the system gave the error, not a decompressor that met damaged bytes."""
    return isinstance(error, OSError) and error.errno is not None


def parse(line: bytes) -> dict[str, Any]:
    """The object that a line is; Broken otherwise."""
    if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
        raise Broken(f"longer than {LONGEST_LINE:,} bytes")
    try:
        found = json.loads(line.rstrip().decode())
    except UnicodeDecodeError as error:
        raise Broken(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise Broken(f"no JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a whole number of more digits than Python takes
        raise Broken(f"no JSON ({str(error).partition(';')[0]})") from error
    if not isinstance(found, dict):
        raise Broken(f"no JSON object but {type(found).__name__}")
    return found
