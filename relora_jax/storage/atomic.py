"""Files and directories that are complete or absent, even after a kill or a power cut.

They are written under a temporary name and then renamed. Another process may write the same path at the same
time: it writes the same bytes. In an object store, each write is one whole object, and has no temporary name.
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
from relora_jax.storage.location import AnyPath, file_system, is_remote, store_errors_as_os_errors
from relora_jax.storage.lock import locked

TEMPORARY = "*.new"  # the names of `temporary_path`
MARK = ".relora_jax"  # a file in each directory that `directory` made


def write(path: AnyPath, content: bytes) -> None:
    """Replaces the content of `path` in one step."""
    if is_remote(path):
        with store_errors_as_os_errors(path):
            file_system(path).pipe_file(str(path), content)
        return
    temporary = temporary_path(path)
    temporary.write_bytes(content)
    publish(temporary, path)


def temporary_path(path: Path) -> Path:
    """The path under which this process writes `path` before it renames it."""
    return path.with_name(f"{path.name}.{os.getpid()}.new")


def publish(temporary: Path, path: Path) -> None:
    """Renames `temporary` to `path`, after its bytes are on the disk."""
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file's content, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise  # some file systems cannot fsync directories
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Removes a file or directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def make_once(path: Path, make: Callable[[Path], object], *, variable: str, resume: bool = False) -> Path:
    """Creates `path` with `make(partial)` and a rename, unless it exists; returns `path`.

    One process makes it while the others wait. A kill leaves at most `path`.partial, which nobody reads: the
    next call removes it, or with `resume` passes it to `make` as it is. The error for an unwritable `path`
    names `variable`, the environment variable that moves it.
    """
    if path.exists():
        return path
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): set {variable} to another path") from error

    def wait(_: str) -> None:
        print(f"waiting for another process to make {path}", file=sys.stderr)

    with locked(lock, busy=wait):
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            if not resume:
                remove(partial)
            make(partial)
            partial.rename(path)
            sync(path.parent)
    return path


def check_output(path: Path, ours: Sequence[str], *, overwrite: bool) -> None:
    """UserError if `directory` must not write to `path`, because foreign files would be lost.

    With `overwrite`, an older output may be replaced: it has our mark, and only files that match `ours`.
    """
    nearest = next((p for p in (path, *path.parents) if p.is_symlink() or p.exists()), path)
    if path.is_symlink() or not nearest.is_dir():
        problem = "a symbolic link" if path.is_symlink() else "not a directory"
        raise UserError(f"--output={path}: {nearest} is {problem}: choose another path")
    entries = sorted(path.rglob("*")) if path.exists() else []
    files = [str(file.relative_to(path)) for file in entries if file.is_symlink() or not file.is_dir()]
    foreign = [name for name in files if not any(fnmatch.fnmatchcase(name, kind) for kind in (MARK, *ours))]
    if entries and (foreign or MARK not in files):
        problem = f"holds {foreign[0]!r}" if foreign else "was not written by this command"
        raise UserError(f"--output={path} is not empty and {problem}: choose another path")
    if entries and not overwrite:
        raise UserError(f"--output={path} is not empty: choose another path, or replace it with --overwrite")


@contextlib.contextmanager
def directory(path: Path, ours: Sequence[str], *, overwrite: bool) -> Iterator[Path]:
    """Yields a new directory that replaces `path` at the end of the `with`, or is removed after an error.

    UserError if another process is writing it.
    """
    partial, old, lock = (path.with_name(f".{path.name}.{word}") for word in ("partial", "replaced", "lock"))
    check_output(path, ours, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)

    def refuse(_: str) -> None:
        raise UserError(f"--output={path} is being written by another process: wait until it ends")

    with locked(lock, busy=refuse):
        try:
            _restore_or_discard(path, old)
            remove(partial)  # of a killed process
            partial.mkdir()
            yield partial
            write(partial / MARK, b"")
            check_output(path, ours, overwrite=overwrite)  # `path` may have changed in the meantime
            if path.exists():
                path.rename(old)
            partial.rename(path)
            sync(path.parent)
        finally:
            _restore_or_discard(path, old)
            _remove_patiently(partial)
            lock.unlink()


def _restore_or_discard(path: Path, old: Path) -> None:
    """Moves the previous directory back if nothing replaced it, and deletes it otherwise."""
    if old.exists():
        remove(old) if path.exists() else old.rename(path)


def _remove_patiently(partial: Path) -> None:
    """Removes a directory to which threads of a failed save may still write; their error is raised."""
    for pause in (0.0, 0.05, 0.1, 0.2, 0.4, 0.8):  # seconds; the next start removes the rest
        time.sleep(pause)
        shutil.rmtree(partial, ignore_errors=True)
        if not partial.exists():
            break
