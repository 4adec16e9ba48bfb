"""What is whole under its name or not there at all, also after a kill or a power cut: written aside, renamed.

Another process may be making the same: the same bytes, renamed to the same name.
"""

import contextlib
import fcntl
import fnmatch
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from relora_jax import places

ASIDE = "*.new"  # what a kill leaves
MARK = ".relora_jax"  # in a directory that `directory` made


def write(path: Path, content: bytes) -> None:
    """The whole content under its name."""
    aside = _aside(path)
    aside.write_bytes(content)
    _rename(aside, path)


def check_output(path: Path, ours: Sequence[str], *, overwrite: bool) -> None:
    """ValueError where `directory` must not put a new one at `path`: something is there that it would lose.

    With `overwrite` an older one may be: it has our mark, and no file but those of the patterns `ours`.
    """
    blocking = next((place for place in (path, *path.parents) if place.is_symlink() or place.exists()), path)
    if path.is_symlink() or not blocking.is_dir():
        what = "a link" if path.is_symlink() else "no directory"
        raise ValueError(f"--output={path}: {blocking} is {what}: name another place")
    there = sorted(path.rglob("*")) if path.exists() else []
    files = [str(file.relative_to(path)) for file in there if file.is_symlink() or not file.is_dir()]
    foreign = [name for name in files if not any(fnmatch.fnmatchcase(name, kind) for kind in (MARK, *ours))]
    if there and (foreign or MARK not in files):
        what = f"holds {foreign[0]!r}" if foreign else "was not written by this command"
        raise ValueError(f"--output={path} is not empty and {what}: name another place")
    if there and not overwrite:
        raise ValueError(f"--output={path} is not empty: name another place, or replace it with --overwrite")


@contextlib.contextmanager
def directory(path: Path, ours: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """A new directory beside `path`, which takes its place where the `with` ends well and else is gone.

    ValueError where another process is making it.
    """
    aside, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "replaced"))
    check_output(path, ours, overwrite=overwrite)
    aside.mkdir(parents=True, exist_ok=True)
    lock = os.open(aside, os.O_RDONLY)
    try:
        _lock(lock, path)
        _mend(path, old)
        for left in aside.iterdir():  # by a kill
            places.remove(left)
        try:
            yield aside
            write(aside / MARK, b"")
            check_output(path, ours, overwrite=overwrite)  # again: much may have happened meanwhile
            if path.exists():
                path.rename(old)
            aside.rename(path)
        finally:
            _mend(path, old)
            _clear(aside)
    finally:
        os.close(lock)


def _clear(aside: Path) -> None:
    """Gone also where threads of a save that failed still end in it; their error is the one that is told."""
    for pause in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):  # seconds; what then remains goes at the next start
        time.sleep(pause)
        shutil.rmtree(aside, ignore_errors=True)
        if not aside.exists():
            break


def _lock(descriptor: int, path: Path) -> None:
    """The lock dies with the process."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--output={path} is being written by another process: wait for its end") from None


def _mend(path: Path, old: Path) -> None:
    """What was there before comes back where nothing took its place, and is gone where something did."""
    if old.exists():
        places.remove(old) if path.exists() else old.rename(path)


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
