"""Writing to a run's directory and printing, from one process only."""

import io
import os
import sys
from typing import TextIO

from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath, file_system, is_remote, store_errors_as_os_errors


class Writer:
    """Writes to a run's directory and prints; with `active=False` (another process does it), does nothing.

    What a run writes goes through a `Writer` or is skipped if it is not `active` (curves, report, traces).
    Each process itself writes its shards of a checkpoint's arrays, and its stacks if the run stands still.
    """

    def __init__(self, folder: AnyPath, *, active: bool = True) -> None:
        self.folder, self.active = folder, active

    def write(self, name: str, text: str) -> None:
        """Replaces the file's content in one step, even if a kill comes."""
        if self.active:
            atomic.write(self.folder / name, text.encode())

    def write_bytes(self, folder: str, name: str, content: bytes) -> None:
        """As `write`, in a folder of the run's directory, which is created."""
        if self.active:
            if not is_remote(self.folder):
                (self.folder / folder).mkdir(exist_ok=True)
            atomic.write(self.folder / folder / name, content)

    def append(self, name: str) -> "Lines | ObjectLines":
        """Opens a file of lines to append to."""
        if not self.active:
            return Lines(None)
        if is_remote(self.folder):
            return ObjectLines(self.folder / name)
        return Lines((self.folder / name).open("a", encoding="utf-8"))

    def rename(self, path: AnyPath, new: AnyPath) -> None:
        """Renames a file or directory, creating the parent directory of `new`; an object store copies it."""
        if self.active and is_remote(path):
            with store_errors_as_os_errors(path):
                store = file_system(path)
                store.copy(str(path), str(new), recursive=True)
                store.rm(str(path), recursive=True)
        elif self.active:
            new.parent.mkdir(exist_ok=True)
            path.rename(new)

    def clear(self) -> None:
        """Removes temporary files of killed processes, but not reports: one may be being written."""
        for file in self.folder.glob(atomic.TEMPORARY) if self.active else ():
            if not file.name.startswith("report."):
                file.unlink(missing_ok=True)

    def stream(self, stream: TextIO | io.TextIOBase) -> TextIO | io.TextIOBase:
        """`stream`, or one that discards its text."""
        return stream if self.active else _Silence()

    def print(self, text: str, *, warning: bool = False) -> None:
        """Prints a line to stdout, or a warning to stderr."""
        if self.active:
            print(text, file=sys.stderr if warning else sys.stdout, flush=True)


class _Silence(io.TextIOBase):
    def write(self, text: str) -> int:
        return len(text)


class Lines:
    """A file that grows line by line; with `file=None`, lines are discarded."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    def add(self, line: str) -> None:
        """Appends a line, flushed so that other processes can read it."""
        if self._file:
            self._file.write(line + "\n")
            self._file.flush()

    def sync(self) -> None:
        """Flushes all lines to the disk."""
        if self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file:
            self._file.close()


class ObjectLines:
    """The same in an object store, which appends nothing: `sync` replaces the object by all of its lines."""

    def __init__(self, path: AnyPath) -> None:
        self._path, self._changed = path, False
        self._content = bytearray(path.read_bytes() if path.exists() else b"")

    def add(self, line: str) -> None:
        """Adds a line, which other processes can read after the next `sync`."""
        self._content += f"{line}\n".encode()
        self._changed = True

    def sync(self) -> None:
        """Writes all lines to the store, if any is new."""
        if self._changed:
            atomic.write(self._path, bytes(self._content))
            self._changed = False

    def close(self) -> None:
        """Writes all lines to the store, if any is new."""
        self.sync()
