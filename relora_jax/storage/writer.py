"""The one process that writes a run's directory and speaks to the user."""

import io
import os
import sys
from pathlib import Path
from typing import TextIO

from relora_jax.storage import atomic


class Writer:
    """Writes a run's directory and prints; where another process does that (`active=False`), nothing.

    What a run writes passes through here or is only begun where `active`: curves, report. Not so the arrays
    of a checkpoint, of which each process writes its own shards.
    """

    def __init__(self, folder: Path, *, active: bool = True) -> None:
        self.folder, self.active = folder, active

    def write(self, name: str, text: str) -> None:
        """The whole text under its name, or the file as it was, also after a kill."""
        if self.active:
            atomic.write(self.folder / name, text.encode())

    def append(self, name: str) -> "Lines":
        """The file of lines under that name, to add to."""
        return Lines((self.folder / name).open("a", encoding="utf-8") if self.active else None)

    def rename(self, path: Path, new: Path) -> None:
        """A file or directory gets another name, in a directory that is made where it is missing."""
        if self.active:
            new.parent.mkdir(exist_ok=True)
            path.rename(new)

    def clear(self) -> None:
        """Removes what a kill left half written; a report may be being written by another process."""
        for left in self.folder.glob(atomic.ASIDE) if self.active else ():
            if not left.name.startswith("report."):
                left.unlink(missing_ok=True)

    def stream(self, stream: TextIO | io.TextIOBase) -> TextIO | io.TextIOBase:
        """The stream, or one that takes text and shows nothing."""
        return stream if self.active else _Silence()

    def say(self, text: str, *, warning: bool = False) -> None:
        """A line for the user: on stdout, or a warning on stderr."""
        if self.active:
            print(text, file=sys.stderr if warning else sys.stdout, flush=True)


class _Silence(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class Lines:
    """A file that grows line by line; without one, nothing is written."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def add(self, line: str) -> None:
        """One more line, which another process may read at once."""
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Every line is on the disk after this."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing is added after this."""
        if self._file:
            self._file.close()
