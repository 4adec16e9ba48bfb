"""The first signal requests a stop; a second one or a timeout ends the process with exit code 75."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from relora_jax.errors import STOPPED
from relora_jax.run.signals import Signals

CODE = """
import hashlib, time
from relora_jax.run import signals
signals.GRACE_S = {grace_s}
with signals.Signals() as received:
    received.exit_immediately = {exit_immediately}
    print("ready", flush=True)
    {body}
print("ended", received.stop_requested, flush=True)
"""
IN_PYTHON = "while not received.stop_requested: time.sleep(0.01)"
AFTER_WORK = "while not received.stop_requested: time.sleep(0.01)\n    time.sleep(1)"
SLEEPING = "time.sleep(60)"
IN_C = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"  # for hours; no Python handler runs


def started(body: str, *, grace_s: float = 25.0, exit_immediately: bool = False) -> subprocess.Popen[str]:
    code = CODE.format(body=body, grace_s=grace_s, exit_immediately=exit_immediately)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        code = process.wait(timeout=20)
        assert process.stdout is not None and process.stderr is not None
        return code, process.stdout.read(), process.stderr.read()  # with what readline has buffered


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_first_signal_only_requests_a_stop(number: signal.Signals) -> None:
    process = started(AFTER_WORK)
    process.send_signal(number)
    assert ended(process) == (0, "ended True\n", "")


def test_without_a_signal_nothing_happens() -> None:
    assert ended(started("pass")) == (0, "ended False\n", "")


@pytest.mark.parametrize("body", [SLEEPING, IN_C], ids=["asleep", "in C"])
def test_second_signal_exits_immediately(body: str) -> None:
    process = started(body)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.8)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process)
    assert code == STOPPED and out == "" and "at the second signal" in err and err.count("\n") == 2


def test_two_signals_within_half_a_second_count_as_one() -> None:
    process = started(AFTER_WORK)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[:2] == (0, "ended True\n")


@pytest.mark.parametrize("body", [SLEEPING, IN_C], ids=["asleep", "in C"])
def test_timeout_ends_work_that_does_not_stop(body: str) -> None:
    process = started(body, grace_s=1.0)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    code, out, err = ended(process)
    assert code == STOPPED and out == "" and "after 1 s" in err and 0.9 < time.monotonic() - start < 10


def test_first_signal_exits_while_there_is_nothing_to_finish() -> None:
    process = started(IN_C, exit_immediately=True)
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == STOPPED and "stopped immediately" in err


def test_handlers_are_restored() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Signals() as signals:
        signals.exit_immediately = False
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.stop_requested  # immediately: the current update is the last one
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


# The first start ends as if killed; the second waits, and saves at SIGTERM; the third exits with the code.
RUN = """#!/bin/bash
echo start >> starts
case $(wc -l < starts) in
  1) exit 137;;
  2) trap 'sleep 0.5; echo saved; exit 75' TERM; echo ready; for k in {1..600}; do sleep 0.1; done;;
  *) exit $(cat code);;
esac
"""


def supervised(folder: pathlib.Path) -> subprocess.Popen[str]:
    """The loop of docs/train.md around RUN."""
    page = (pathlib.Path(__file__).parents[2] / "docs/train.md").read_text()
    [loop] = [block for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "until [" in block]
    (folder / "python").write_text(RUN)
    (folder / "python").chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        ["bash", "-c", loop], cwd=folder, env={**os.environ, "PATH": path}, text=True, **pipes
    )


def test_documented_supervisor_passes_the_signal_on_and_starts_again(tmp_path: pathlib.Path) -> None:
    shell = supervised(tmp_path)
    assert shell.stdout is not None and shell.stdout.readline() == "ready\n"
    shell.send_signal(signal.SIGTERM)  # to the shell only
    assert ended(shell) == (STOPPED, "saved\n", "")
    assert (tmp_path / "starts").read_text() == "start\n" * 2
    for code in ("0", "2", "70"):
        (tmp_path / "code").write_text(code)
        assert ended(supervised(tmp_path))[0] == int(code)
