"""Every second of a run is in its updates or in one cause, over all of its starts."""

import contextlib
import io
import json
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from relora_jax.run import goodput, metrics_file
from relora_jax.run.goodput import Clock, Times, read
from relora_jax.run.metrics import Metrics
from relora_jax.storage.writer import Writer


class Now:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    now = Now()
    monkeypatch.setattr(goodput, "_now", now)
    return now


def test_time_is_charged_to_the_outer_cause(now: Now) -> None:
    clock = Clock()
    now.now += 3
    clock.begin(goodput.UPDATES)
    now.now += 5
    with clock.spending("evaluation"):
        now.now += 7
        with clock.spending("save"):
            now.now += 11
    now.now += 13
    with pytest.raises(KeyError), clock.spending("save"):
        now.now += 17
        raise KeyError
    times = clock.times()
    spent = {cause: seconds for cause, seconds in times.lost_s.items() if seconds}
    assert spent == {"start": 3, "evaluation": 18, "save": 17} and times.elapsed_s == 56
    assert clock.spent[goodput.UPDATES] == clock.training_s() == 18
    assert str(times) == "32.1% in updates, evaluation 32.1%, save 30.4%, start 5.4%"
    assert str(Times()) == "-"


def test_longest_time_of_a_cause_is_from_its_begin_to_its_end(now: Now) -> None:
    clock = Clock()
    now.now += 3
    clock.begin(goodput.UPDATES)
    for seconds in (2, 7, 5):
        now.now += 1
        with clock.spending("evaluation"):
            now.now += seconds
            clock.times()  # charges what has passed
            now.now += 1
    assert clock.longest == {"start": 3, goodput.UPDATES: 1, "evaluation": 8}


def test_compilation_is_charged_to_itself_wherever_it_is(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    compilations = goodput._Compilations()
    monkeypatch.setattr(goodput, "_compilations", lambda: compilations)
    clock = Clock()
    clock.begin(goodput.UPDATES)
    with clock.spending("evaluation"):
        now.now += 3
        compilations.add("/jax/core/compile/jaxpr_trace_duration", 1.0)  # inside the next one
        now.now += 2
        compilations.add("/jax/core/compile/jaxpr_trace_duration", 4.0)
        now.now += 2
        compilations.add("/jax/core/compile/backend_compile_duration", 2.0)
        now.now += 3
        compilations.add("/jax/other", 3.0)
    assert clock.times().lost_s["compile"] == 6 and clock.times().lost_s["evaluation"] == 4


def test_compilations_of_jax_are_noticed() -> None:
    clock = Clock()
    clock.begin(goodput.UPDATES)
    jax.jit(lambda x: x * 3 + 0.125)(jnp.arange(7.0)).block_until_ready()
    assert 0 < clock.times().lost_s["compile"] <= clock.times().elapsed_s


class Output:
    """What a device computes until the time `ready_at`."""

    def __init__(self, now: Now, ready_at: float) -> None:
        self._now, self._ready_at, self.seen = now, ready_at, threading.Event()

    def block_until_ready(self) -> None:
        while self._now() < self._ready_at:
            time.sleep(0.001)
        self.seen.set()


def test_waiting_for_data_counts_only_while_the_devices_wait_too(now: Now) -> None:
    outputs = [Output(now, ready_at) for ready_at in (102.0 + 1.5, 120.0, 104.0 + 10)]

    def slow():
        now.now += 2  # nothing is computed yet
        yield 0
        now.now += 1.5
        assert outputs[0].seen.wait(5)  # the device is ready after 1.5 of 2 seconds
        time.sleep(0.05)
        now.now += 0.5
        yield 1
        now.now += 2  # while the device computes
        yield 2

    clock = Clock()
    clock.begin(goodput.UPDATES)
    for batch in clock.batches(slow()):
        clock.computing(outputs[batch])
    assert clock.times().lost_s["data"] == 2 + 0.5 and clock.training_s() == 6
    assert clock.times().elapsed_s == 6
    now.now = 1000.0  # ends the thread


def opened(workdir: Path, restored_update: int, *, fresh: bool = False) -> Metrics:
    return Metrics(
        Writer(workdir), updates=30, restored_update=restored_update, fresh=fresh, stream=io.StringIO()
    )


@contextlib.contextmanager
def killed(workdir: Path):
    """A fresh start that ends without another row."""
    with contextlib.suppress(KeyError), opened(workdir, 0, fresh=True) as metrics:
        yield metrics
        raise KeyError


def train(metrics: Metrics, update: int) -> None:
    metrics.train(update, loss=1.0, lr=1.0, grad_norm=1.0, tokens_seen=update, restarts=0, skipped=0)


def test_updates_after_the_newest_checkpoint_are_redone(tmp_path: Path, now: Now) -> None:
    with killed(tmp_path) as metrics:
        now.now += 10
        train(metrics, 10)
        with metrics.pause("save"):
            metrics.flush(10)
            now.now += 1
        now.now += 5
        train(metrics, 15)
        with metrics.pause("evaluation"):
            now.now += 2
        metrics.flush(15)  # of a checkpoint that the kill leaves unfinished
        now.now += 3
        train(metrics, 18)
    assert read(tmp_path).lost_s["evaluation"] == 2

    with opened(tmp_path, 10) as metrics:
        now.now += 20
        train(metrics, 20)
    times = read(tmp_path)
    assert times.elapsed_s == 10 + 1 + 5 + 2 + 3 + 20
    assert {cause: seconds for cause, seconds in times.lost_s.items() if seconds} == {"redone": 11}
    rows = [json.loads(line) for line in (tmp_path / "time.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [0, 10, 10, 20]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["elapsed_s"] == 41


def test_run_killed_before_its_first_checkpoint_is_redone_whole(tmp_path: Path, now: Now) -> None:
    with killed(tmp_path) as metrics:
        now.now += 10
        train(metrics, 10)
    with opened(tmp_path, 0, fresh=True) as metrics:
        now.now += 30
        train(metrics, 20)
    assert read(tmp_path).lost_s["redone"] == 10 and read(tmp_path).elapsed_s == 40
    assert read(tmp_path / "missing") == Times()


def test_lost_time_is_kept_if_the_next_start_dies_at_once(tmp_path: Path, now: Now) -> None:
    with killed(tmp_path) as metrics:
        metrics.flush(10)
        now.now += 20
        train(metrics, 15)
    with contextlib.suppress(KeyError), opened(tmp_path, 10):
        raise KeyError
    with opened(tmp_path, 10) as metrics:
        now.now += 5
    assert read(tmp_path).lost_s["redone"] == 20 and read(tmp_path).elapsed_s == 25


def test_times_are_written_every_minute(tmp_path: Path, now: Now) -> None:
    with killed(tmp_path) as metrics:
        for update in range(1, 5):
            now.now += 40
            train(metrics, update)
    assert [row["update"] for row in metrics_file.read(tmp_path, goodput.FILE)] == [0, 2, 4]


def test_rows_that_somebody_has_edited_do_not_count(tmp_path: Path, now: Now) -> None:
    rows = [{}, {"elapsed_s": "5"}, {"elapsed_s": 5}, {"elapsed_s": 5, "lost_s": [1]}]
    rows.append({"elapsed_s": 5, "lost_s": {"save": None}})
    text = "".join(json.dumps({"kind": "time", "update": 1, **row}) + "\n" for row in rows)
    (tmp_path / goodput.FILE).write_text(text)
    assert read(tmp_path) == Times()
    with opened(tmp_path, 1):
        now.now += 1
    assert read(tmp_path).elapsed_s == 1
