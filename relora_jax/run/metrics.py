"""A run's metrics rows, written from one queue to metrics.jsonl, sinks such as TensorBoard, and the terminal.

    train    update, loss, lr, grad_norm, tokens_seen, tokens_per_s, mfu, data_share, restarts, skipped,
             peak_bytes, elapsed_s
    eval     update, loss, perplexity, tokens
    sample   update, prompt, text: the model's continuation of a held-out prompt
    restart  update, merged, reset, logits_change, logits_rms, base_rounding, moments_cleared, moments_asked,
             delta_norm, effective_rank, overlap_in, overlap_out

`update` counts completed updates. A line is one row in strict JSON: a number that is not finite (the loss
of a skipped update, say) is null. `elapsed_s` is the total time of all starts of the run in seconds.
`tokens_per_s` is the mean since the previous train row, without pauses (see `pause`) and compilation: quote
the median over a run (`metrics_file.median`). In the same time, `mfu` is the share of the devices' peak that
the model's FLOPs take (null if the peak is not known), and `data_share` that in which they waited for data.
`peak_bytes` is the most memory that a device has held in this start (null if it does not say).

Of a restart: the largest change of a logit of held-out rows, beside their RMS and the relative spacing of the
base type; the share of the factors' moments that was cleared, beside what `relora.prune` asks for (null
without a reset); the norm of what was merged, over all kernels, and its mean effective rank; the share of its
space, on the side of the inputs and of the outputs, that lies in that of the merge before.
"""

import contextlib
import json
import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from relora_jax.config import MAX_CONSECUTIVE_SKIPS
from relora_jax.run import goodput, metrics_file
from relora_jax.run.format import number
from relora_jax.run.goodput import Clock
from relora_jax.run.metrics_file import Row
from relora_jax.run.progress import Progress, Stream
from relora_jax.run.tensorboard_sink import Board
from relora_jax.run.wandb_sink import WeightsAndBiases
from relora_jax.storage.writer import Writer
from relora_jax.training import processes

TIMES_EVERY_S = 60.0  # between rows of time.jsonl
MAX_PENDING_ROWS = 2  # older rows are waited for; the device still has these to compute

Sink = Board | WeightsAndBiases


class Diverged(ArithmeticError):  # noqa: N818
    """`MAX_CONSECUTIVE_SKIPS` updates in a row had a loss or a gradient that was not finite."""


class Metrics:
    """Queues and writes rows; a resumed run's file equals an uninterrupted run's, except for times.

    With `fresh` (no checkpoint was restored) the file starts empty. With an inactive writer, the same errors
    are raised but nothing is written or printed. Ends the clock's start.

    Values may be jax arrays that are still being computed (but not donated later): they are queued, copied to
    the host asynchronously, and written in order. Leaving the context writes all queued rows, or after an
    exception only those that are ready.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        updates: int,
        restored_update: int,
        fresh: bool = False,
        sinks: Sequence[Sink] = (),
        stream: Stream | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._writer, self._clock = writer, clock or Clock()
        kept = -1 if fresh else restored_update
        before = [row for row in metrics_file.read(writer.folder) if row["kind"] == "train"]
        self._clock.earlier = goodput.cut(writer, kept, before)
        rows = metrics_file.cut(writer, kept)
        train_rows = [row for row in rows if row["kind"] == "train"]
        evaluated = max((row["update"] for row in rows if row["kind"] == "eval"), default=-1)
        self.evaluated = processes.from_writer(evaluated)
        self._last: Row = train_rows[-1] if train_rows else {"update": 0, "tokens_seen": 0}
        self._start, self._update, self._times_s = restored_update, max(kept, 0), 0.0
        self._queue: deque[tuple[Row, Any]] = deque()
        self._file, self._times = writer.append(metrics_file.NAME), writer.append(goodput.FILE)
        self._sinks = sinks
        out = sys.stdout if stream is None else stream  # looked up now: it may be redirected
        self._progress = Progress(writer.stream(out), updates=updates, start=restored_update)
        self._clock.begin(goodput.UPDATES)
        self._trained_s, self._waited_s = self._clock.training_s(), self._clock.spent["data"]
        self._write_times(self._update)

    def train(
        self,
        update: int,
        *,
        loss: Any,
        lr: Any,
        grad_norm: Any,
        tokens_seen: Any,
        restarts: Any,
        skipped: Any,
        skipped_in_row: Any = 0,
        peak_bytes: int | None = None,
        peak_tokens_per_s: float | None = None,
    ) -> None:
        """Queues a train row. Raises Diverged, now or later, if `skipped_in_row` (not written) is 20 or more.

        `tokens_seen` may be uint32[2]: its low and high word. `peak_tokens_per_s`: at an MFU of 1.
        """
        row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_seen": tokens_seen}
        row |= {"tokens_per_s": None, "mfu": peak_tokens_per_s, "data_share": None}  # replaced when written
        row |= {"restarts": restarts, "skipped": skipped, "peak_bytes": peak_bytes, "elapsed_s": 0.0}
        self._put({"kind": "train", "update": update} | row, skipped_in_row)

    def eval(self, update: int, *, loss: Any, perplexity: Any, tokens: Any) -> None:
        """Queues an eval row and sets `evaluated`, the update of the newest one (-1 before the first)."""
        self.evaluated = update
        row = {"loss": loss, "perplexity": perplexity, "tokens": tokens}
        self._put({"kind": "eval", "update": update} | row)

    def sample(self, update: int, *, prompt: str, text: str) -> None:
        """Queues a sample row."""
        self._put({"kind": "sample", "update": update, "prompt": prompt, "text": text})

    def restart(self, update: int, *, merged: bool, reset: bool, **facts: Any) -> None:
        """Queues a restart row; `update` is the one that begins with the restart."""
        row = {"kind": "restart", "update": update, "merged": bool(merged), "reset": bool(reset)}
        self._put(row | facts)

    def flush(self, update: int) -> None:
        """Writes every queued row to the disk, and the times after an update, before its checkpoint."""
        self._drain()
        self._file.sync()
        self._write_times(update)
        for sink in self._sinks:
            sink.flush()

    @contextlib.contextmanager
    def pause(self, cause: str, after: Any = None) -> Iterator[None]:
        """Charges the time inside to a cause (see goodput.py), which excludes it from `tokens_per_s`.

        First waits for `after`, an array of the last update, so that all of its computation is counted.
        """
        if self._clock.cause == goodput.UPDATES:
            self._drain()
            getattr(after, "block_until_ready", lambda: None)()
        with self._clock.spending(cause):
            yield

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush(self._update)
            else:
                with contextlib.suppress(Exception):  # the first error is the one to report
                    self._drain(keep=len(self._queue))
        finally:
            self._clock.begin("save")  # the last checkpoint is waited for
            for part in (self._progress, self._file, self._times, *self._sinks):
                with contextlib.suppress(OSError):  # a full disk was already reported by a write
                    part.close()

    def _put(self, row: Row, skipped_in_row: Any = 0) -> None:
        for value in (*row.values(), skipped_in_row):
            getattr(value, "copy_to_host_async", lambda: None)()
        self._queue.append((row, skipped_in_row))
        self._update = max(self._update, row["update"])
        self._drain(keep=MAX_PENDING_ROWS)

    def _drain(self, *, keep: int = 0) -> None:
        """Writes the oldest rows while they are ready, then waits for all but `keep` of the others."""
        while self._queue and (len(self._queue) > keep or _ready(*self._queue[0])):
            row, skipped_in_row = self._queue.popleft()
            self._write({key: _plain(key, value) for key, value in row.items()})
            if int(skipped_in_row) >= MAX_CONSECUTIVE_SKIPS:
                raise Diverged(
                    f"{int(skipped_in_row)} updates in a row up to update {row['update']} were skipped "
                    "(loss or gradient not finite, or no target): lower the learning rate, lengthen its "
                    "warm-up, or lower optimizer.clip_norm, in a new --workdir"
                )

    def _write(self, row: Row) -> None:
        if row["kind"] == "train":
            row |= self._rates(row, peak_tokens_per_s=row["mfu"])
            row["elapsed_s"] = round(self._clock.times().elapsed_s, 3)
            self._last = row
            if row["elapsed_s"] - self._times_s > TIMES_EVERY_S:
                self._write_times(row["update"])
        self._file.add(json.dumps(row, allow_nan=False))
        for sink in self._sinks:
            sink.write(row)
        self._show(row)

    def _write_times(self, update: int) -> None:
        times, self._update = self._clock.times(), max(self._update, update)
        self._times_s = times.elapsed_s
        self._times.add(times.row(self._update))
        self._times.sync()

    def _rates(self, row: Row, *, peak_tokens_per_s: float | None) -> Row:
        """Tokens since the previous row, or since this start, over the time since then, and shares of it."""
        now, waited_s = self._clock.training_s(), self._clock.spent["data"]
        seconds, self._trained_s = now - self._trained_s, now
        data_s, self._waited_s = waited_s - self._waited_s, waited_s
        tokens = row["tokens_seen"] - self._last["tokens_seen"]
        updates = row["update"] - self._last["update"]
        own_updates = row["update"] - max(self._start, self._last["update"])  # since this start
        if seconds <= 0 or updates <= 0:
            return {"tokens_per_s": None, "mfu": None, "data_share": None}
        speed = tokens * own_updates / updates / seconds
        mfu = round(speed / peak_tokens_per_s, 4) if peak_tokens_per_s else None
        return {"tokens_per_s": round(speed, 1), "mfu": mfu, "data_share": round(data_s / seconds, 4)}

    def _show(self, row: Row) -> None:
        if row["kind"] == "train":
            self._progress.show(row)
        elif row["kind"] == "eval":
            loss, perplexity = number(row["loss"], ".4f"), number(row["perplexity"], ",.1f")
            self._progress.note(f"update {row['update']}: validation loss {loss}, perplexity {perplexity}")
        elif row.get("reset"):  # merges between resets can be too frequent to print
            merged = "factors merged, " if row["merged"] else ""
            self._progress.note(f"update {row['update']}: restart, {merged}optimizer reset")


def exact_count(value: Any) -> int:
    """A count as an int; a uint32[2] is low + 2^32 * high."""
    words = [int(word) for word in np.ravel(np.asarray(value))]
    return words[0] + (words[1] << 32) if len(words) == 2 else words[0]


def _plain(key: str, value: Any) -> Any:
    """The value as JSON has it: int for counts, else float, None if not finite."""
    if value is None or isinstance(value, str | bool):
        return value
    if key in ("update", "tokens", "tokens_seen", "restarts", "skipped", "peak_bytes"):
        return exact_count(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _ready(row: Row, skipped_in_row: Any) -> bool:
    return all(getattr(value, "is_ready", lambda: True)() for value in (*row.values(), skipped_in_row))
