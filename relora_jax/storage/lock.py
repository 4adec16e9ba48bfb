"""A lock that dies with the process that holds it, however that dies."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def locked(file: Path, *, busy: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """While inside, no other process is inside with the same `file`, which the one inside may remove.

    Where another one is, `busy(its number)` is called: it raises, or the call waits after it returns. What is
    yielded writes this process's number into the file; until then it stays as it was.
    """
    while True:
        with file.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                busy(lock.read().strip() or "?")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(file, lock.fileno()):  # removed meanwhile by the one who had it
                continue

            def sign() -> None:
                lock.truncate(0)
                lock.write(f"{os.getpid()}\n")
                lock.flush()

            yield sign
            return


def _is_at(file: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    return False
