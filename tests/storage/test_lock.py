"""One process at a time holds a lock, also where the one inside removes its file."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from relora_jax.storage.lock import locked


def refuse(process: str) -> None:
    raise BlockingIOError(process)


def test_a_lock_is_held_by_one_and_ends_with_it(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from relora_jax.storage.lock import locked\n"
    code += "with locked(Path(sys.argv[1]), busy=sys.exit): print('inside')"
    other = lambda: subprocess.run([sys.executable, "-c", code, tmp_path / "lock"], capture_output=True)  # noqa: E731
    with locked(tmp_path / "lock", busy=refuse) as sign:
        sign()
        assert other().stdout == b""
    assert other().stdout == b"inside\n"


def test_a_lock_that_the_holder_removed_is_taken_anew(tmp_path: Path) -> None:
    """Two wait for one that removes the file: they hold one after the other, not each a file of its own."""
    file, inside, most = tmp_path / "lock", [0], [0]
    waiting = threading.Barrier(3)

    def wait() -> None:
        with locked(file, busy=lambda _: waiting.wait() and None):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            with pytest.raises(BlockingIOError), locked(file, busy=refuse):
                pass  # whoever comes now meets the file that is held
            inside[0] -= 1

    threads = [threading.Thread(target=wait) for _ in range(2)]
    with locked(file, busy=refuse):
        for thread in threads:
            thread.start()
        waiting.wait()
        file.unlink()
    for thread in threads:
        thread.join()
    assert most == [1]
