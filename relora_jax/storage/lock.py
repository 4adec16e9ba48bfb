"""A file lock that is released when its process ends, even by a kill; in an object store a lease."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from relora_jax.storage import lease
from relora_jax.storage.location import AnyPath, is_remote


@contextlib.contextmanager
def locked(file: AnyPath, *, busy: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Holds an exclusive lock on `file`, which the holder may remove.

    If another process holds it, calls `busy(its pid)`, which raises, or waits for the lock. Yields a function
    that writes this process's pid into the file, which is unchanged until then. In an object store, `busy`
    must raise, and the pid is written at once.
    """
    if is_remote(file):
        with lease.leased(file, busy=busy):
            yield lambda: None
        return
    while True:
        with file.open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                busy(lock.read().strip() or "?")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(file, lock.fileno()):  # its previous holder removed it
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
