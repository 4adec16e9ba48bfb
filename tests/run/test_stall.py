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
    monkeypatch.setattr(stall, "FIRST_S", 1.0)
    monkeypatch.setattr(stall, "EVERY_S", 0.01)
    clock = Clock()
    clock.begin("updates")
    return clock


class Done:
    def block_until_ready(self) -> None:
        pass


def updates(clock: Clock, count: int = 5, seconds: float = 0.02) -> None:
    for _ in range(count):
        time.sleep(seconds)
        clock.computing(Done())


def test_run_that_stands_still_is_reported_once_with_its_stacks(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stalls(Writer(tmp_path), clock):
        updates(clock)
        stand_still()
        reported = capsys.readouterr().err
        assert reported.count("no update for") == 1 and f"are in {tmp_path}/stacks-0.txt" in reported
        stacks = (tmp_path / "stacks-0.txt").read_text()
        assert "Thread MainThread:" in stacks and "stand_still" in stacks and "(updates)" in stacks
        updates(clock)
        stand_still()
        assert capsys.readouterr().err.count("no update for") == 1  # the next one, although not longer


def test_evaluation_is_measured_by_the_longest_one_before(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stalls(Writer(tmp_path), clock):
        updates(clock)
        for seconds in (0.4, 1.2):  # the second is longer than anything may take at first
            with clock.spending("evaluation"):
                time.sleep(seconds)
            updates(clock)
        assert not capsys.readouterr().err
        with clock.spending("save"):
            time.sleep(1.2)
        assert "(save)" in capsys.readouterr().err


def test_update_that_ends_during_an_evaluation_does_not_end_it(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stall, "FIRST_S", 5.0)

    class Slow(Done):
        def block_until_ready(self) -> None:
            time.sleep(0.05)

    with Stalls(Writer(tmp_path), clock):
        updates(clock)
        clock.computing(Slow())
        with clock.spending("evaluation"):
            time.sleep(0.8)
    assert not capsys.readouterr().err


def test_first_updates_have_a_limit_of_their_own(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stalls(Writer(tmp_path), clock):
        stand_still()
        updates(clock, 4)
        stand_still()
        assert not capsys.readouterr().err
        time.sleep(0.7)
        assert "(updates)" in capsys.readouterr().err


def test_wait_below_ten_times_the_median_is_not_reported(tmp_path: Path, clock: Clock) -> None:
    with Stalls(Writer(tmp_path), clock):
        updates(clock, seconds=0.08)
        stand_still()
    assert not (tmp_path / "stacks-0.txt").exists()


def test_host_may_be_ahead_of_the_devices(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    class Slow(Done):
        def block_until_ready(self) -> None:
            time.sleep(0.05)

    with Stalls(Writer(tmp_path), clock):
        for _ in range(20):  # dispatched at once; then one row of metrics is waited for
            clock.computing(Slow())
        time.sleep(1.0)
    assert not capsys.readouterr().err


def test_disk_that_fails_does_not_end_the_watch(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Stalls(Writer(tmp_path / "missing"), clock):
        updates(clock)
        stand_still()
    assert "stacks-0.txt cannot be written ([Errno 2]" in capsys.readouterr().err


def stand_still() -> None:
    time.sleep(0.5)
