import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from relora_jax.data import workers
from relora_jax.data.file_source import find


def say(task):
    """The task twice, and who said it; or an error; or nothing more, ever."""
    yield task, os.getpid()
    if task == "mistake":
        find("nothing/*.txt", field="", validation_fraction=0.1)
    if task == "bug":
        int("x")
    if task == "disk":
        raise OSError(28, "No space left on device")
    if task == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "for ever":
        time.sleep(1000)
    yield task, os.getpid()


def test_one_worker_is_this_process_and_does_the_tasks_in_order():
    assert list(workers.run(say, [1, 2], 1)) == [(task, os.getpid()) for task in (1, 1, 2, 2)]
    assert list(workers.run(say, [1], 4)) == [(1, os.getpid())] * 2 and not list(workers.run(say, [], 4))


def test_every_task_is_done_once_by_one_of_the_processes_and_they_end():
    said = list(workers.run(say, range(20), 2))
    assert Counter(task for task, _ in said) == dict.fromkeys(range(20), 2)
    assert len(set(said)) == 20  # both messages of a task come from one process
    assert len(people := {pid for _, pid in said}) == 2 and os.getpid() not in people
    assert not any(os.path.exists(f"/proc/{pid}") for pid in people)


@pytest.mark.parametrize(
    ("task", "kind", "said"),
    [
        ("mistake", ValueError, "^data.text 'nothing/.*' matches no file"),
        ("bug", RuntimeError, "a worker failed\n(.|\n)*ValueError: invalid literal"),
        ("disk", OSError, "No space left"),
        ("killed", OSError, "ended from outside .exit code -9.*fewer --workers"),
    ],
)
def test_error_in_a_process_comes_out_and_ends_the_others(task, kind, said):
    messages = workers.run(say, [task, "for ever"], 2)
    people = []
    with pytest.raises(kind, match=said):
        people.extend(pid for _, pid in messages)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in people)


def test_closing_ends_the_processes_at_once():
    messages = workers.run(say, ["for ever", "for ever"], 2)
    _, pid = next(messages)
    messages.close()
    assert not os.path.exists(f"/proc/{pid}")


def test_ctrl_c_reaches_no_worker_not_even_the_first(tmp_path):
    (tmp_path / "mask.py").write_text(
        "import signal\nfrom relora_jax.data import workers\n"
        "def work(task): yield signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])\n"
        "if __name__ == '__main__': print(list(workers.run(work, [1, 2], 2)))\n"
    )
    words = [sys.executable, str(tmp_path / "mask.py")]
    assert subprocess.run(words, capture_output=True, text=True).stdout == "[True, True]\n"
