"""The items of one JSON array, read without holding all of it in memory."""

import codecs
import io
import json
from collections.abc import Iterator

from relora_jax.data import json_lines

_DECODER = json.JSONDecoder()
_STEP = 2**18  # bytes read at a time


def is_array(stream: io.BufferedReader) -> bool:
    """Whether the content starts with a bracket; nothing is consumed."""
    return stream.peek(1).removeprefix(json_lines.BOM).lstrip().startswith(b"[")


def items(stream: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """(number from 1, source) of each item of the array, for `json_lines.parse`.

    json_lines.Broken if an item is not JSON: the next one cannot be located then. Its message completes
    "the array is ...".
    """
    text = _Text(stream)
    text.take()  # the bracket
    number = 0
    while text.following() != "]":
        number += 1
        if number > 1 and text.take() != ",":
            raise json_lines.Broken(f"not JSON (no comma or bracket after item {number - 1})")
        yield number, text.value(number).encode("utf-8", "surrogateescape")
    text.take()
    if text.following():
        raise json_lines.Broken("not the whole file (text follows its closing bracket)")


class _Text:
    """The characters that are not read yet; bytes that are not UTF-8 stay as they are, in surrogates."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._buffer, self._start = "", 0

    def _read(self) -> bool:
        """Reads on, twice as much each time; whether there was anything left."""
        rest = self._buffer[self._start :]
        more = self._stream.read(max(_STEP, len(rest)))
        self._buffer, self._start = rest + self._decoder.decode(more, final=not more), 0
        return bool(more)

    def following(self) -> str:
        """The next character that is not white space, which is not consumed; empty at the end."""
        while True:
            while self._start < len(self._buffer):
                if not self._buffer[self._start].isspace():
                    return self._buffer[self._start]
                self._start += 1
            if not self._read():
                return ""

    def take(self) -> str:
        """Consumes the next character that is not white space."""
        character = self.following()
        self._start += 1
        return character

    def value(self, number: int) -> str:
        """Consumes a JSON value and returns its source."""
        self.following()
        while True:
            try:
                _, end = _DECODER.raw_decode(self._buffer, self._start)
                problem = "" if end < len(self._buffer) else "it has no end"  # a number may be cut off
            except (ValueError, RecursionError) as error:
                end, problem = 0, json_lines.reason(error)  # or its rest is not read yet
            if not problem:
                source, self._start = self._buffer[self._start : end], end
                return source
            too_long = len(self._buffer) - self._start > json_lines.LONGEST_LINE
            if too_long or not self._read():
                raise json_lines.Broken(f"not JSON (item {number}: {problem})")
