"""JSON lines, one UTF-8 object per line, with errors that name the line."""

import io
import json
from collections.abc import Iterator
from typing import Any

LONGEST_LINE = 2**26  # bytes; longer lines count as broken, which bounds memory
BOM = b"\xef\xbb\xbf"


class Broken(Exception):  # noqa: N818
    """An invalid line; the message completes "the line is ..."."""


def lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line) of each non-empty line; of an overlong line only the beginning."""
    number, complete = 0, True
    while line := stream.readline(LONGEST_LINE):
        new, complete = complete, line.endswith(b"\n")
        if new:
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                yield number, line


def parse(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; Broken otherwise."""
    if len(line) >= LONGEST_LINE and not line.endswith(b"\n"):
        raise Broken(f"longer than {LONGEST_LINE:,} bytes")
    try:
        value = json.loads(line.rstrip().decode())
    except UnicodeDecodeError as error:
        raise Broken(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise Broken(f"not JSON ({reason(error)} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise Broken(f"not JSON ({reason(error)})") from error
    if not isinstance(value, dict):
        raise Broken(f"not a JSON object but {type(value).__name__}")
    return value


def reason(error: Exception) -> str:
    """What the JSON parser reports, without a position and without advice for programmers."""
    if isinstance(error, json.JSONDecodeError):
        return error.msg
    return str(error).partition(";")[0]  # an integer with more digits than Python parses
