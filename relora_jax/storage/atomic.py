"""What is whole under its name or not there at all, also after a kill or a power cut: written aside, renamed.

Another process may be making the same: the same bytes, renamed to the same name.
"""

import contextlib
import errno
import fnmatch
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from relora_jax.errors import UserError
from relora_jax.storage.lock import locked

ASIDE = "*.new"  # what a kill leaves
MARK = ".relora_jax"  # in a directory that `directory` made


def write(path: Path, content: bytes) -> None:
    """The whole content under its name."""
    aside = name_aside(path)
    aside.write_bytes(content)
    publish(aside, path)


def name_aside(path: Path) -> Path:
    """Where this process writes what becomes `path`."""
    return path.with_name(f"{path.name}.{os.getpid()}.new")


def publish(aside: Path, path: Path) -> None:
    """`aside` becomes `path`, its bytes on the disk first: a power cut leaves no name without them."""
    sync(aside)
    aside.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """What was written into a file, or the names in a directory, are on the disk after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # some file systems have no such call for directories
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """The file or directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_once(path: Path, make: Callable[[Path], object], *, variable: str, resume: bool = False) -> Path:
    """After the call `path` is there, whole: made aside by `make(aside)`, then renamed.

    One process makes, others wait for it. A kill at any moment leaves at most `path`.partial, which
    nobody reads and the next maker removes; with `resume` it continues with what is there. `variable` is
    the environment variable that moves the place, named when it cannot be written.
    """
    if path.exists():
        return path
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): set {variable} to another place") from error

    def wait(_: str) -> None:
        print(f"waiting for another process to make {path}", file=sys.stderr)

    with locked(lock, busy=wait):
        if not path.exists():
            aside = path.with_name(f"{path.name}.partial")
            if not resume:
                remove(aside)
            make(aside)
            aside.rename(path)
            sync(path.parent)
    return path


def check_output(path: Path, ours: Sequence[str], *, overwrite: bool) -> None:
    """UserError where `directory` must not put a new one at `path`: something is there that it would lose.

    With `overwrite` an older one may be: it has our mark, and no file but those of the patterns `ours`.
    """
    blocking = next((place for place in (path, *path.parents) if place.is_symlink() or place.exists()), path)
    if path.is_symlink() or not blocking.is_dir():
        what = "a link" if path.is_symlink() else "no directory"
        raise UserError(f"--output={path}: {blocking} is {what}: name another place")
    there = sorted(path.rglob("*")) if path.exists() else []
    files = [str(file.relative_to(path)) for file in there if file.is_symlink() or not file.is_dir()]
    foreign = [name for name in files if not any(fnmatch.fnmatchcase(name, kind) for kind in (MARK, *ours))]
    if there and (foreign or MARK not in files):
        what = f"holds {foreign[0]!r}" if foreign else "was not written by this command"
        raise UserError(f"--output={path} is not empty and {what}: name another place")
    if there and not overwrite:
        raise UserError(f"--output={path} is not empty: name another place, or replace it with --overwrite")


@contextlib.contextmanager
def directory(path: Path, ours: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """A new directory beside `path`, which takes its place where the `with` ends well and else is gone.

    UserError where another process is making it.
    """
    aside, old, lock = (path.with_name(f".{path.name}.{word}") for word in ("partial", "replaced", "lock"))
    check_output(path, ours, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)

    def refuse(_: str) -> None:
        raise UserError(f"--output={path} is being written by another process: wait for its end")

    with locked(lock, busy=refuse):
        try:
            _put_back(path, old)
            remove(aside)  # what a kill left
            aside.mkdir()
            yield aside
            write(aside / MARK, b"")
            check_output(path, ours, overwrite=overwrite)  # again: much may have happened meanwhile
            if path.exists():
                path.rename(old)
            aside.rename(path)
            sync(path.parent)
        finally:
            _put_back(path, old)
            _clear(aside)
            lock.unlink()


def _put_back(path: Path, old: Path) -> None:
    """What was there before is restored where nothing took its place, and removed where something did."""
    if old.exists():
        remove(old) if path.exists() else old.rename(path)


def _clear(aside: Path) -> None:
    """Gone also where threads of a save that failed still end in it; their error is the one to show."""
    for pause in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):  # seconds; what then remains goes at the next start
        time.sleep(pause)
        shutil.rmtree(aside, ignore_errors=True)
        if not aside.exists():
            break
