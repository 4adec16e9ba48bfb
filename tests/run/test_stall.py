import time
from pathlib import Path

import pytest

from relora_jax.run import stall
from relora_jax.run.goodput import Clock
from relora_jax.run.stall import Stalls
from relora_jax.storage.writer import Writer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(stall, "LEAST_S", 0.1)
    monkeypatch.setattr(stall, "EVERY_S", 0.01)
    clock = Clock()
    clock.begin_updates()
    return clock


def updates(stalls: Stalls, count: int = 5) -> None:
    for _ in range(count):
        time.sleep(0.001)
        stalls.update()


def test_run_that_stands_still_is_reported_once_with_its_stacks(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stalls(Writer(tmp_path), clock) as stalls:
        updates(stalls)
        with clock.spending("save"):
            stand_still()
        reported = capsys.readouterr().err
        assert reported.count("no update for") == 1 and f"are in {tmp_path}/stacks-0.txt" in reported
        stacks = (tmp_path / "stacks-0.txt").read_text()
        assert "Thread MainThread:" in stacks and "stand_still" in stacks and "(save)" in stacks
        updates(stalls)
        stand_still()
        assert capsys.readouterr().err.count("(updates)") == 1  # the next one, although not longer


def test_wait_that_is_no_longer_than_an_earlier_one_is_not_reported(tmp_path: Path, clock: Clock) -> None:
    with Stalls(Writer(tmp_path), clock) as stalls:
        time.sleep(1.0)  # compilation
        updates(stalls, 4)
        stand_still()  # no median yet
        updates(stalls, 1)
        stand_still()
    assert not (tmp_path / "stacks-0.txt").exists()


def test_wait_below_ten_times_the_median_is_not_reported(tmp_path: Path, clock: Clock) -> None:
    with Stalls(Writer(tmp_path), clock) as stalls:
        for _ in range(5):
            time.sleep(0.08)
            stalls.update()
        stand_still()
    assert not (tmp_path / "stacks-0.txt").exists()


def test_disk_that_fails_does_not_end_the_watch(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stalls(Writer(tmp_path / "missing"), clock) as stalls:
        updates(stalls)
        stand_still()
    assert "stacks-0.txt cannot be written ([Errno 2]" in capsys.readouterr().err


def stand_still() -> None:
    time.sleep(0.5)
