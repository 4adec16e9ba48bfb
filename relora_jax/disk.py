"""What is whole under its name or not there at all, also after a kill or a power cut: written aside, renamed.

Another process may be making the same: the same bytes, renamed to the same name.
"""

import os
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

ASIDE = "*.new"  # what a kill leaves


def write(path: Path, content: bytes) -> None:
    """The whole content under its name."""
    aside = _aside(path)
    aside.write_bytes(content)
    _rename(aside, path)


class RecordWriter:
    """An ArrayRecord file in the making; under its name where its `with` ends well, and otherwise gone.

    OSError where the disk does not take it: the library's own is a RuntimeError.
    """

    def __init__(self, path: Path, options: str) -> None:
        self._path, self._aside, self._records = path, _aside(path), 0
        try:
            self._writer = ArrayRecordWriter(str(self._aside), options)
        except RuntimeError as error:
            raise self._unwritten(error) from error

    def write(self, record: bytes) -> None:
        """Adds a record."""
        try:
            self._writer.write(record)  # pyright: ignore
        except RuntimeError as error:
            raise self._unwritten(error) from error
        self._records += 1

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._writer.close()
            there = ArrayRecordReader(str(self._aside)).num_records() if kind is None else 0
        except RuntimeError as error:
            self._aside.unlink(missing_ok=True)
            raise self._unwritten(error) from error
        if kind is not None:
            self._aside.unlink(missing_ok=True)
        elif there != self._records:
            raise OSError(f"{self._aside} holds {there} of {self._records} records: is the disk full?")
        else:
            _rename(self._aside, self._path)

    def _unwritten(self, error: RuntimeError) -> OSError:
        return OSError(f"{self._path} cannot be written ({str(error).partition(';')[0]})")


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.new")


def _rename(aside: Path, path: Path) -> None:
    """Once its bytes are on the disk: a power cut leaves no name without them."""
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)
