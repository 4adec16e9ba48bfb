"""JSON lines, one UTF-8 object per line, with errors that name the line."""

import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

LONGEST_LINE = 2**26  # bytes; longer lines count as broken, which bounds memory
DAMAGE = (EOFError, OSError, zlib.error)  # of gzip and pyarrow, whose OSErrors have no errno
BOM = b"\xef\xbb\xbf"


class Broken(Exception):  # noqa: N818
    """An invalid line; the message completes "the line is ..."."""


class Damaged(Exception):  # noqa: N818
    """The stream ends too early, or cannot be decompressed, at `line`."""

    def __init__(self, line: int, error: Exception) -> None:
        super().__init__(str(error))
        self.line = line


def lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each non-empty line; of an overlong line only the beginning.

    Damaged if the stream is, OSError if the disk fails.
    """
    number, complete = 0, True
    while line := _read(stream, number + complete):
        new, complete = complete, line.endswith(b"\n")
        if new:
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
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
    """Whether the operating system raised the error, rather than a decompressor on damaged bytes."""
    return isinstance(error, OSError) and error.errno is not None


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; Broken otherwise."""
    if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
        raise Broken(f"longer than {LONGEST_LINE:,} bytes")
    try:
        value = json.loads(line.rstrip().decode())
    except UnicodeDecodeError as error:
        raise Broken(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise Broken(f"not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # an integer with more digits than Python parses
        raise Broken(f"not JSON ({str(error).partition(';')[0]})") from error
    if not isinstance(value, dict):
        raise Broken(f"not a JSON object but {type(value).__name__}")
    return value
