"""JSON lines, one object a line, also gzipped: what is wrong with a line is told in its place."""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import IO

LONGEST_LINE = 2**26  # bytes; a longer one counts as broken, so that memory is bounded


def read(
    raw: IO[bytes], fields: Sequence[str], *, unzip: bool
) -> Iterator[tuple[int, dict[str, bytes] | str]]:
    """(number from 1, fields in UTF-8 or what is wrong) of each line that is not empty.

    The first field must be there, others are empty where they are not; all are texts.

    What cannot be unzipped is one broken line, the last.
    """
    stream = gzip.GzipFile(fileobj=raw) if unzip else raw
    number = 0
    try:
        while line := stream.readline(LONGEST_LINE):
            number += 1
            if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = stream.readline(LONGEST_LINE)
                yield number, f"longer than {LONGEST_LINE:,} bytes"
            elif line.strip():
                yield number, _fields(line, fields)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield number + 1, f"the file ends or is damaged here: {error}"


def _fields(line: bytes, fields: Sequence[str]) -> dict[str, bytes] | str:
    """The fields of a line, or what is wrong with it."""
    try:
        found = json.loads(line.strip())
        if not isinstance(found, dict):
            return "no JSON object"
        if fields[0] not in found:
            return f"it has no `{fields[0]}`"
        texts = {name: found.get(name, "") for name in fields}
        if others := [name for name, text in texts.items() if not isinstance(text, str)]:
            return f"its `{others[0]}` is not a text"
        return {name: text.encode() for name, text in texts.items()}
    except json.JSONDecodeError as error:
        return f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:
        return str(error)
