"""One process at a time holds a lock, even if the holder removes its file."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relora_jax.storage.lock import locked


def refuse(process: str) -> None:
    raise BlockingIOError(process)


def test_lock_is_exclusive_and_released_at_the_end(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from relora_jax.storage.lock import locked\n"
    code += "with locked(Path(sys.argv[1]), busy=sys.exit): print('inside')"
    other = lambda: subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], capture_output=True)  # noqa: E731
    with locked(tmp_path / "lock", busy=refuse) as sign:
        sign()
        assert other().stdout == b""
    assert other().stdout == b"inside\n"


def test_waiters_exclude_each_other_after_the_holder_removed_the_file(tmp_path: Path) -> None:
    """They must lock the same new file one after the other, not the removed file and a new one."""
    file, inside, most = tmp_path / "lock", [0], [0]
    waiting = threading.Semaphore(0)  # a waiter may find the new file locked, too

    def wait() -> None:
        with locked(file, busy=lambda _: waiting.release()):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            with pytest.raises(BlockingIOError), locked(file, busy=refuse):
                pass
            inside[0] -= 1

    threads = [threading.Thread(target=wait) for _ in range(2)]
    with locked(file, busy=refuse):
        for thread in threads:
            thread.start()
        for _ in threads:
            waiting.acquire()
        file.unlink()
    for thread in threads:
        thread.join()
    assert most == [1]
