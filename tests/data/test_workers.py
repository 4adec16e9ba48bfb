import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from relora_jax.data import workers
from relora_jax.data.file_source import find


def work(task):
    """Yields (task, pid) twice, or fails in the way that the task names."""
    yield task, os.getpid()
    if task == "mistake":
        find("nothing/*.txt", field="", validation_fraction=0.1)
    if task == "bug":
        int("x")
    if task == "disk":
        raise OSError(28, "No space left on device")
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hang":
        time.sleep(1000)
    yield task, os.getpid()


def test_one_worker_runs_tasks_in_order_in_this_process():
    assert list(workers.run(work, [1, 2], 1)) == [(task, os.getpid()) for task in (1, 1, 2, 2)]
    assert list(workers.run(work, [1], 4)) == [(1, os.getpid())] * 2 and not list(workers.run(work, [], 4))


def test_every_task_runs_once_in_one_of_the_processes_which_then_exit():
    messages = list(workers.run(work, range(20), 2))
    assert Counter(task for task, _ in messages) == dict.fromkeys(range(20), 2)
    assert len(set(messages)) == 20  # both messages of a task come from one process
    assert len(pids := {pid for _, pid in messages}) == 2 and os.getpid() not in pids
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        ("mistake", ValueError, "^data.text 'nothing/.*' matches no file"),
        ("bug", RuntimeError, "a worker failed\n(.|\n)*ValueError: invalid literal"),
        ("disk", OSError, "No space left"),
        ("killed", OSError, "was killed .exit code -9.*fewer --workers"),
    ],
)
def test_error_in_a_worker_is_raised_and_ends_the_others(task, kind, message):
    messages = workers.run(work, [task, "hang"], 2)
    pids = []
    with pytest.raises(kind, match=message):
        pids.extend(pid for _, pid in messages)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_closing_ends_the_processes_at_once():
    messages = workers.run(work, ["hang", "hang"], 2)
    _, pid = next(messages)
    messages.close()
    assert not os.path.exists(f"/proc/{pid}")


def test_ctrl_c_reaches_no_worker_not_even_the_first(tmp_path):
    (tmp_path / "mask.py").write_text(
        "import signal\nfrom relora_jax.data import workers\n"
        "def work(task): yield signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "if __name__ == '__main__': print(list(workers.run(work, [1, 2], 2)))\n"
    )
    args = [sys.executable, str(tmp_path / "mask.py")]
    assert subprocess.run(args, capture_output=True, text=True).stdout == "[True, True]\n"
