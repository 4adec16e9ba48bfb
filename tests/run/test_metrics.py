"""Metrics rows: in order, exact, without waiting for the device, and the same file after a kill."""

import io
import json
import math
import os
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from relora_jax.run import format, goodput, metrics_file, progress
from relora_jax.run.metrics import Diverged, Metrics, exact_count
from relora_jax.run.metrics_file import read
from relora_jax.run.tensorboard_sink import Board
from relora_jax.storage.writer import Writer

SAVES = (0, 10, 20, 30)


class Later:
    """An array that the device is still computing; `float` waits for it."""

    def __init__(self, value: float, *, ready: bool = False) -> None:
        self.value, self.ready, self.copied, self.waited_for = value, ready, False, False

    def copy_to_host_async(self) -> None:
        self.copied = True

    def is_ready(self) -> bool:
        return self.ready

    __int__ = lambda self: int(self.value)  # noqa: E731

    def __float__(self) -> float:
        self.waited_for = not self.ready
        return self.value


class Clock:
    """Replaces the module `time` and the clock of metrics."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    monotonic = __call__


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(goodput, "_now", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def opened(workdir: Path, restored_update: int = 0, updates: int = 30, stream=None, fresh=False) -> Metrics:
    board = Board(workdir / "tensorboard", purge_step=0 if fresh else restored_update + 1)
    options = {"updates": updates, "restored_update": restored_update, "fresh": fresh, "sinks": [board]}
    return Metrics(Writer(workdir), stream=stream or io.StringIO(), **options)


def train(metrics: Metrics, update: int, **values) -> None:
    row = {"loss": 5.0 / update, "lr": 1e-3, "grad_norm": 0.5, "tokens_seen": 64 * update}
    metrics.train(update, **(row | {"restarts": 0, "skipped": 0} | values))


def run(metrics: Metrics, start: int, end: int, saved: dict[int, str] | None = None) -> None:
    """The loop's calls: restart at the beginning of an update; log, evaluate and save by cadence."""
    if start == 0 and saved is not None:
        metrics.eval(0, loss=6.0, perplexity=math.exp(6.0), tokens=320)
        metrics.flush(0)
        saved[0] = text_of(metrics)
    for u in range(start, end):
        if u and u % 10 == 0:
            metrics.restart(u, merged=True, reset=u % 20 == 0)
        if (u + 1) % 5 == 0:
            train(metrics, u + 1, restarts=u // 10)
        if (u + 1) % 10 == 0:
            metrics.eval(u + 1, loss=2.0, perplexity=math.exp(2.0), tokens=320)
        if u + 1 in SAVES:
            metrics.flush(u + 1)
            if saved is not None:
                saved[u + 1] = text_of(metrics)


def text_of(rows: Metrics) -> str:
    return (rows._writer.folder / "metrics.jsonl").read_text()


def without_times(text: str) -> list[dict]:
    return [
        {k: v for k, v in json.loads(line).items() if k not in metrics_file.TIMES}
        for line in text.splitlines()
    ]


def events(workdir: Path) -> list[Event]:
    """Every event of every file, in the order in which TensorBoard reads them."""
    result = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data, offset = file.read_bytes(), 0
        while offset < len(data):
            (length,) = struct.unpack_from("<Q", data, offset)
            result.append(Event.FromString(data[offset + 12 : offset + 12 + length]))
            offset += 12 + length + 4
    return result


def curves(workdir: Path) -> dict[str, list[int]]:
    """Steps per curve as TensorBoard shows them: a session hides earlier points from its start step on."""
    shown: list[tuple[str, int]] = []
    for event in events(workdir):
        if event.session_log.status == SessionLog.START:
            shown = [point for point in shown if point[1] < event.step]
        shown += [(value.tag, event.step) for value in event.summary.value]
    return {tag: [step for name, step in shown if name == tag] for tag, _ in shown}


@pytest.mark.parametrize("u", SAVES)
def test_file_of_a_resumed_run_equals_the_uninterrupted_one_except_times(tmp_path: Path, u: int) -> None:
    saved: dict[int, str] = {}
    with opened(tmp_path) as whole:
        run(whole, 0, 30, saved)
    uninterrupted = text_of(whole)
    with opened(tmp_path, u) as resumed:
        assert text_of(resumed) == saved[u]
        run(resumed, u, 30)
    assert without_times(text_of(resumed)) == without_times(uninterrupted)


def test_restart_that_the_resumed_run_repeats_is_cut_and_earlier_ones_stay(tmp_path: Path) -> None:
    with opened(tmp_path) as whole:
        run(whole, 0, 30)
    with opened(tmp_path, 20):
        pass
    rows = [(row["kind"], row["update"]) for row in read(tmp_path)]
    assert ("restart", 10) in rows and ("restart", 20) not in rows and ("eval", 20) in rows


def test_samples_are_kept_up_to_the_checkpoint_and_are_neither_curves_nor_lines(tmp_path: Path) -> None:
    out = io.StringIO()
    with opened(tmp_path, stream=out) as rows:
        for u in (0, 10, 20):
            rows.sample(u, prompt="a|\u2028b", text=f"\n{u}")
    assert out.getvalue() == "" and not (tmp_path / "tensorboard").exists()
    with opened(tmp_path, 10):
        pass
    sample = {"kind": "sample", "prompt": "a|\u2028b"}
    assert read(tmp_path) == [{**sample, "update": u, "text": f"\n{u}"} for u in (0, 10)]


def test_incomplete_last_line_is_dropped(tmp_path: Path) -> None:
    with opened(tmp_path) as whole:
        run(whole, 0, 12)
    text = text_of(whole)
    before = text[: text.rstrip("\n").rindex("\n") + 1]
    for end in range(len(before), len(text) - 1):
        (tmp_path / "metrics.jsonl").write_text(text[:end])
        assert read(tmp_path) == [json.loads(line) for line in before.splitlines()]
        with opened(tmp_path, 30) as resumed:
            assert text_of(resumed) == before


def test_first_evaluation_has_one_row_whether_or_not_it_is_repeated(tmp_path: Path) -> None:
    for loss in (6.0, 7.0):  # killed before its first save, the run starts over
        with opened(tmp_path, fresh=True) as first:
            first.eval(0, loss=loss, perplexity=1.0, tokens=320)
    assert [row["loss"] for row in read(tmp_path)] == [7.0]
    with opened(tmp_path) as resumed:  # killed after it, the run resumes from the checkpoint at 0
        run(resumed, 0, 10)
    assert [row["kind"] for row in read(tmp_path)] == ["eval", "train", "train", "eval"]
    assert curves(tmp_path)["validation/loss"] == [0, 10]


def test_cut_replaces_the_file_only_when_the_new_one_is_complete(tmp_path: Path, monkeypatch) -> None:
    with opened(tmp_path) as whole:
        run(whole, 0, 30)
    before = text_of(whole)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        opened(tmp_path, 10)
    assert text_of(whole) == before


def test_row_is_waited_for_only_when_two_newer_ones_are_queued(tmp_path: Path) -> None:
    losses = [Later(float(n)) for n in range(4)]
    with opened(tmp_path) as rows:
        for n, loss in enumerate(losses):
            train(rows, n + 1, loss=loss)
            assert loss.copied and not loss.waited_for
            assert [loss.waited_for for loss in losses] == [k <= n - 2 for k in range(4)]
        rows.flush(4)
        assert all(loss.waited_for for loss in losses)
    assert [row["loss"] for row in read(tmp_path)] == [0.0, 1.0, 2.0, 3.0]


def test_rows_keep_their_order_and_ready_ones_are_written_immediately(tmp_path: Path) -> None:
    with opened(tmp_path) as rows:
        train(rows, 1)
        assert [row["update"] for row in read(tmp_path)] == [1]
        train(rows, 2, loss=(slow := Later(1.0)))
        rows.eval(2, loss=2.0, perplexity=3.0, tokens=320)
        assert [row["update"] for row in read(tmp_path)] == [1]
        slow.ready = True
        rows.restart(2, merged=True, reset=True)
    assert not slow.waited_for
    assert [row["kind"] for row in read(tmp_path)] == ["train", "train", "eval", "restart"]


def test_flush_leaves_every_row_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path) as rows:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
        train(rows, 1, loss=Later(1.0))
        rows.flush(1)
        # the rows, the times and the curves
        assert (tmp_path / "metrics.jsonl").stat().st_size in synced and len(synced) == 3
        assert len(read(tmp_path)) == 1 and "train/lr" in curves(tmp_path)


def test_device_values_are_written_exactly(tmp_path: Path) -> None:
    tokens_seen = jnp.array([7, 3], jnp.uint32)
    with opened(tmp_path) as rows:
        train(
            rows,
            1,
            loss=jnp.float32(0.1),
            grad_norm=jnp.bfloat16(1.5),
            tokens_seen=tokens_seen,
            skipped=jnp.int32(2),
        )
        rows.eval(1, loss=jnp.float32(2.5), perplexity=np.float64(12.25), tokens=jnp.uint32(4_000_000_000))
        rows.restart(1, merged=True, reset=False)
    row, evaluated, restarted = read(tmp_path)
    assert row["loss"] == float(np.float32(0.1)) and row["grad_norm"] == 1.5
    assert row["tokens_seen"] == 3 * 2**32 + 7 and row["skipped"] == 2
    assert evaluated == {
        "kind": "eval",
        "update": 1,
        "loss": 2.5,
        "perplexity": 12.25,
        "tokens": 4_000_000_000,
    }
    assert restarted == {"kind": "restart", "update": 1, "merged": True, "reset": False}


@pytest.mark.parametrize("count", [0, 5, 2**32 - 1, 2**32, 2**33 + 17, 23_100_000_000, 2**63 + 1])
def test_count_of_two_uint32_is_exact(count: int) -> None:
    pair = np.array([count % 2**32, count // 2**32], np.uint32)
    assert exact_count(pair) == exact_count(jax.device_put(pair)) == exact_count(count) == count


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_strict_json(tmp_path: Path, value: float) -> None:
    with opened(tmp_path) as rows:
        train(rows, 1, loss=jnp.float32(value), grad_norm=value)
        rows.eval(1, loss=value, perplexity=value, tokens=1)

    def refuse(text: str) -> None:
        raise AssertionError(text)

    lines = text_of(rows).splitlines()
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["loss"] for row in parsed] == [None, None] and parsed[0]["grad_norm"] is None


def test_twenty_skips_in_a_row_stop_the_run_and_nineteen_do_not(tmp_path: Path) -> None:
    with opened(tmp_path) as rows:
        train(rows, 19, loss=math.nan, skipped_in_row=jnp.int32(19))
        train(rows, 20, loss=math.nan, skipped_in_row=Later(20))
        with pytest.raises(
            Diverged, match=r"20 updates in a row up to update 20 .*lower the learning rate"
        ) as error:
            rows.flush(20)
    assert "\n" not in str(error.value) and not isinstance(error.value, ValueError)
    assert [row["update"] for row in read(tmp_path)] == [19, 20]
    assert "in_row" not in text_of(rows)


def test_after_an_error_ready_rows_are_written_and_none_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="the first error"), opened(tmp_path) as rows:
        train(rows, 1, loss=(first := Later(1.0)))
        train(rows, 2, loss=(second := Later(2.0)))
        first.ready = True
        raise KeyError("the first error")
    assert [row["update"] for row in read(tmp_path)] == [1] and not second.waited_for


def test_tokens_per_s_is_the_mean_since_the_previous_row_without_pauses(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path) as rows:
        clock.now += 8
        train(rows, 1, tokens_seen=80)  # the first counts from the opening
        clock.now += 2
        with rows.pause("save"):
            clock.now += 1000
            with rows.pause("save"):
                clock.now += 1000
            rows.eval(1, loss=1.0, perplexity=1.0, tokens=1)
        clock.now += 2
        with rows.pause("save"):
            clock.now += 1000
            train(rows, 2, tokens_seen=280)
        clock.now += 5
        train(rows, 3, tokens_seen=305)
    assert [row["tokens_per_s"] for row in read(tmp_path) if row["kind"] == "train"] == [10.0, 50.0, 5.0]
    assert [row["elapsed_s"] for row in read(tmp_path) if row["kind"] == "train"] == [8.0, 3012.0, 3017.0]


def test_pause_waits_for_earlier_updates_while_the_clock_still_runs(tmp_path: Path, clock: Clock) -> None:
    class Unfinished(Later):
        def block_until_ready(self) -> None:
            clock.now += 5

    with opened(tmp_path) as rows:
        train(rows, 1, loss=(loss := Later(1.0)))
        with rows.pause("save", after=Unfinished(0.0)):
            assert loss.waited_for
            clock.now += 100
        train(rows, 2)
    assert read(tmp_path)[1]["tokens_per_s"] == 64 / 5


def test_first_row_of_a_resumed_run_counts_only_its_own_updates(tmp_path: Path, clock: Clock) -> None:
    with opened(tmp_path) as rows:
        clock.now += 7
        train(rows, 10)
    with opened(tmp_path, 15) as rows:  # a save between two logs
        clock.now += 4
        train(rows, 20)
    assert read(tmp_path)[1]["tokens_per_s"] == 64 * 5 / 4
    assert read(tmp_path)[1]["elapsed_s"] == 11.0  # of both starts


def test_mfu_and_the_wait_for_data_are_shares_of_the_time_of_updates(tmp_path: Path, clock: Clock) -> None:
    out, peak = io.StringIO(), {"peak_tokens_per_s": 40.0, "peak_bytes": 2**40}
    with opened(tmp_path, stream=out) as rows:
        clock.now += 6
        with rows._clock.spending("data"):
            clock.now += 2
        with rows.pause("save"):
            clock.now += 1000
        train(rows, 1, tokens_seen=80, **peak)
        clock.now += 10
        train(rows, 2, tokens_seen=380, **peak)
        train(rows, 3, tokens_seen=480, **peak)  # no time since the last
        clock.now += 1
        train(rows, 4, tokens_seen=580)
    first, second, third, last = (row for row in read(tmp_path) if row["kind"] == "train")
    assert (first["tokens_per_s"], first["mfu"], first["data_share"]) == (10, 0.25, 0.25)
    assert (second["tokens_per_s"], second["mfu"], second["data_share"]) == (30, 0.75, 0)
    assert (third["tokens_per_s"], third["mfu"], third["data_share"]) == (None, None, None)
    assert (last["mfu"], last["peak_bytes"], first["peak_bytes"]) == (None, None, 2**40)
    assert "10 tokens/s  25% MFU\n" in out.getvalue()


def test_throughput_of_a_run_is_the_median_of_its_rows() -> None:
    rows = [{"kind": "train", "tokens_per_s": speed} for speed in (1.0, 90.0, 100.0, None, 110.0, 95.0)]
    assert metrics_file.median([*rows, {"kind": "eval"}], "tokens_per_s") == 95.0
    assert metrics_file.median(rows, "mfu") is None  # as in rows of earlier versions


@pytest.mark.parametrize("u", [10, 15, 20])
def test_curves_show_no_point_twice_after_a_resume(tmp_path: Path, u: int) -> None:
    with opened(tmp_path) as rows:
        run(rows, 0, 27, {})
    with opened(tmp_path, u) as rows:
        run(rows, u, 30)
    shown = curves(tmp_path)
    assert shown["train/loss"] == shown["train/restarts"] == [5, 10, 15, 20, 25, 30]
    assert shown["validation/perplexity"] == [0, 10, 20, 30]


def test_curves_hide_old_points_that_another_cadence_does_not_repeat(tmp_path: Path) -> None:
    with opened(tmp_path) as rows:
        run(rows, 0, 27, {})
    with opened(tmp_path, 12) as rows:
        train(rows, 30)
    assert curves(tmp_path)["train/loss"] == [5, 10, 30]


def test_curves_have_only_finite_values(tmp_path: Path) -> None:
    with opened(tmp_path) as rows:
        train(rows, 1, loss=math.nan)
    assert "train/loss" not in curves(tmp_path) and "train/lr" in curves(tmp_path)


def test_plain_line_is_printed_every_ten_seconds_and_at_the_end(tmp_path: Path, clock: Clock) -> None:
    out = io.StringIO()
    with opened(tmp_path, updates=100, stream=out) as rows:
        for u in range(1, 58):
            clock.now += 1
            train(rows, u, loss=2.0, tokens_seen=1500 * u)
        rows.eval(57, loss=1.5, perplexity=4.5, tokens=320)
        rows.restart(57, merged=True, reset=False)
        rows.restart(57, merged=True, reset=True)
    text = out.getvalue()
    assert re.findall(r"update (\d+)/100", text) == ["1", "11", "21", "31", "41", "51", "57"]
    assert "update 11/100  loss 2.000  perplexity 7.4  lr 1.0e-03  1,500 tokens/s  1:29 left\n" in text
    assert "update 57: validation loss 1.5000, perplexity 4.5\n" in text
    assert text.count("restart") == 1 and "update 57: restart, factors merged, optimizer reset\n" in text
    assert all(char == "\n" or 32 <= ord(char) < 127 for char in text)


def test_last_plain_line_is_the_last_update(tmp_path: Path, clock: Clock) -> None:
    out = io.StringIO()
    with opened(tmp_path, stream=out) as rows:
        for u in range(1, 31):
            clock.now += 0.01
            train(rows, u)
        rows.eval(30, loss=1.5, perplexity=4.5, tokens=320)
    assert re.findall(r"update (\d+)", out.getvalue()) == ["1", "30", "30"]
    assert "validation" in out.getvalue().splitlines()[-1]


@pytest.mark.parametrize("columns", [0, 100])  # 0: a terminal that reports no size
def test_terminal_redraws_one_line_and_notes_stay_above_it(
    tmp_path, monkeypatch, clock, columns: int
) -> None:
    size = [columns]
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((size[0], size[0] and 24)))
    out = io.StringIO()
    out.isatty = lambda: True
    with opened(tmp_path, 5, stream=out) as rows:
        for u in (6, 7, 30):
            clock.now += 1
            train(rows, u, loss=2.0)
        rows.eval(30, loss=1.5, perplexity=4.5, tokens=320)
        size[0] = columns and 70  # the user resizes the window
    frames = re.split(r"[\r\n]", out.getvalue())
    assert frames[1].startswith("5/30") and any(frame.startswith("7/30") for frame in frames)
    assert any(frame.startswith("30/30") and frame.endswith("0:00 left") for frame in frames)
    assert "update 30: validation loss 1.5000, perplexity 4.5" in frames
    assert 60 < len(frames[-2].rstrip()) <= (size[0] or 80) and out.getvalue().endswith("\n")


def test_time_left_is_remaining_updates_at_the_pace_after_the_first_row(tmp_path: Path, clock: Clock) -> None:
    out = io.StringIO()
    with opened(tmp_path, updates=1000, stream=out) as rows:
        clock.now += 500  # compilation
        train(rows, 10)
        clock.now += 10
        train(rows, 20)
        with rows.pause("save"):
            clock.now += 20  # an evaluation: later ones will take time, too
        train(rows, 30)
    times = [line.rsplit("  ", 1)[1] for line in out.getvalue().splitlines()]
    assert "left" not in times[0] and times[1:] == ["16:20 left", "24:15 left"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (100_000, "1 d 3 h")],
)
def test_durations_are_formatted_as_clock_times(seconds: float, text: str) -> None:
    assert format.duration(seconds) == text


def test_perplexity_that_is_not_finite_is_none() -> None:
    assert format.perplexity(None) is None and format.perplexity(1e4) is None
    assert format.perplexity(2.0) == math.exp(2.0)


def test_no_file_means_no_rows(tmp_path: Path) -> None:
    assert read(tmp_path) == []
