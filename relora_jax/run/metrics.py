"""The rows of a run: metrics.jsonl, sinks such as TensorBoard and the progress line, all from one queue.

    train    update, loss, lr, grad_norm, tokens_seen, tokens_per_s, restarts, skipped, elapsed_s
    eval     update, loss, perplexity, tokens
    sample   update, prompt, text: what the model goes on with after a beginning of held-out text
    restart  update, merged, reset

`update` counts updates done. A line is one row in strict JSON: a number that is not finite (the loss
of a skipped update, say) is null. `elapsed_s` counts the seconds of every start of the run together.
`tokens_per_s` is the mean since the train row before, without what `pause` leaves out; the first row
of every start counts from the opening of `Metrics`, so it holds compilation and reads low, and so does
the first row of the low-rank phase: `tokens_per_s`, the median over a run, is the number to quote.
"""

import contextlib
import json
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from relora_jax.config import SKIPS_IN_ROW
from relora_jax.run import metrics_file
from relora_jax.run.format import number
from relora_jax.run.metrics_file import Row
from relora_jax.run.progress import Progress, Stream
from relora_jax.run.tensorboard_sink import Board
from relora_jax.run.wandb_sink import WeightsAndBiases
from relora_jax.storage.writer import Writer

YOUNGER_ROWS = 2  # a row is waited for when this many younger ones are queued: the device has work left

Sink = Board | WeightsAndBiases
_clock = time.perf_counter


class Diverged(ArithmeticError):  # noqa: N818  (it befell the run)
    """`SKIPS_IN_ROW` updates in a row had a loss or a gradient that was not finite."""


class Metrics:
    """After a resume at u the file is what an uninterrupted run had written when it saved u, but for times.

    With `anew` the file begins empty: no checkpoint of this run was there. A process that does not write
    has the same rows and raises the same errors, without file and line.

    Values may be jax arrays that are still being computed (not ones that a later call donates): they are
    queued, copied while the device goes on, and written in order. As a context manager, it writes all
    that is left at the end, and after an exception what is ready.
    """

    def __init__(
        self,
        writer: Writer,
        *,
        updates: int,
        restored_update: int,
        anew: bool = False,
        sinks: Sequence[Sink] = (),
        stream: Stream | None = None,
    ) -> None:
        self._writer = writer
        kept = metrics_file.cut(writer, -1 if anew else restored_update)
        before = [row for row in kept if row["kind"] == "train"]
        self.evaluated = max((row["update"] for row in kept if row["kind"] == "eval"), default=-1)
        self._last: Row = before[-1] if before else {"update": 0, "tokens_seen": 0, "elapsed_s": 0.0}
        self._elapsed_s, self._opened = self._last["elapsed_s"], _clock()
        self._start, self._last_time, self._paused_s = restored_update, self._opened, 0.0
        self._paused_at: float | None = None
        self._queue: deque[tuple[Row, Any]] = deque()
        self._file = writer.append(metrics_file.NAME)
        self._sinks = sinks
        out = sys.stdout if stream is None else stream  # the stdout of now, not the one at import
        self._progress = Progress(writer.stream(out), updates=updates, done=restored_update)

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
    ) -> None:
        """Queues a train row. Diverged, here or later, where `skipped_in_row` (not written) is 20 or more.

        `tokens_seen` may come as uint32[2], its low and its high word.
        """
        row = {"loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens_seen": tokens_seen}
        row |= {"tokens_per_s": None, "restarts": restarts, "skipped": skipped, "elapsed_s": 0.0}
        self._put({"kind": "train", "update": update} | row, skipped_in_row)

    def eval(self, update: int, *, loss: Any, perplexity: Any, tokens: Any) -> None:
        """Queues an eval row; `evaluated` is the update of the newest, -1 before the first."""
        self.evaluated = update
        row = {"loss": loss, "perplexity": perplexity, "tokens": tokens}
        self._put({"kind": "eval", "update": update} | row)

    def sample(self, update: int, *, prompt: str, text: str) -> None:
        """Queues a sample row."""
        self._put({"kind": "sample", "update": update, "prompt": prompt, "text": text})

    def restart(self, update: int, *, merged: bool, reset: bool) -> None:
        """Queues a restart row; `update` is the one that the restart is the first act of."""
        self._put({"kind": "restart", "update": update, "merged": bool(merged), "reset": bool(reset)})

    def flush(self) -> None:
        """Every queued row is on the disk after this. Call it before a checkpoint is saved."""
        self._drain(keep=0)
        self._file.sync()
        for sink in self._sinks:
            sink.flush()

    @contextlib.contextmanager
    def pause(self, after: Any = None) -> Iterator[None]:
        """The time inside is left out of `tokens_per_s`: for evaluations, saves and restarts.

        `after`: an array of the last update, waited for, so that no update is computed unclocked.
        """
        if self._paused_at is not None:
            yield
            return
        self._drain(keep=0)
        getattr(after, "block_until_ready", lambda: None)()
        self._paused_at = _clock()
        try:
            yield
        finally:
            self._paused_s += _clock() - self._paused_at
            self._paused_at = None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.flush()
            else:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    self._drain(keep=len(self._queue))
        finally:
            for part in (self._progress, self._file, *self._sinks):
                with contextlib.suppress(OSError):  # a full disk was told by the write that met it
                    part.close()

    def _put(self, row: Row, skipped_in_row: Any = 0) -> None:
        for value in (*row.values(), skipped_in_row):
            getattr(value, "copy_to_host_async", lambda: None)()
        self._queue.append((row, skipped_in_row))
        self._drain(keep=YOUNGER_ROWS)

    def _drain(self, *, keep: int) -> None:
        """Writes the oldest rows: those that are ready, and all but `keep` of the others."""
        while self._queue and (len(self._queue) > keep or _ready(*self._queue[0])):
            row, skipped_in_row = self._queue.popleft()
            self._write({key: _plain(key, value) for key, value in row.items()})
            if int(skipped_in_row) >= SKIPS_IN_ROW:
                raise Diverged(
                    f"{int(skipped_in_row)} updates in a row up to update {row['update']} were skipped "
                    "(loss or gradient not finite, or no target): lower the learning rate, lengthen its "
                    "warm-up, or clip harder, in a new --workdir"
                )

    def _write(self, row: Row) -> None:
        if row["kind"] == "train":
            row["tokens_per_s"] = self._tokens_per_s(row)
            row["elapsed_s"] = round(self._elapsed_s + _clock() - self._opened, 3)
            self._last = row
        self._file.add(json.dumps(row, allow_nan=False))
        for sink in self._sinks:
            sink.write(row)
        self._show(row)

    def _tokens_per_s(self, row: Row) -> float | None:
        """Tokens since the row before, or since the start, over the time since then."""
        now = (_clock() if self._paused_at is None else self._paused_at) - self._paused_s
        passed_s, self._last_time = now - self._last_time, now
        tokens = row["tokens_seen"] - self._last["tokens_seen"]
        updates = row["update"] - self._last["update"]
        here = row["update"] - max(self._start, self._last["update"])  # the others came before the start
        return round(tokens * here / updates / passed_s, 1) if passed_s > 0 and updates > 0 else None

    def _show(self, row: Row) -> None:
        if row["kind"] == "train":
            self._progress.show(row)
        elif row["kind"] == "eval":
            loss, perplexity = number(row["loss"], ".4f"), number(row["perplexity"], ",.1f")
            self._progress.note(f"update {row['update']}: validation loss {loss}, perplexity {perplexity}")
        elif row.get("reset"):  # merges between resets can come every few updates: they stay in the file
            merged = "factors merged, " if row["merged"] else ""
            self._progress.note(f"update {row['update']}: restart, {merged}optimizer reset")


def joined(words: Any) -> int:
    """low + 2^32 high: the exact count that a device keeps as uint32[2]; a single number stays itself."""
    parts = [int(word) for word in np.ravel(np.asarray(words))]
    return parts[0] + (parts[1] << 32) if len(parts) == 2 else parts[0]


def _plain(key: str, value: Any) -> Any:
    if value is None or isinstance(value, str | bool):
        return value
    if key in ("update", "tokens", "tokens_seen", "restarts", "skipped"):
        return joined(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _ready(row: Row, skipped_in_row: Any) -> bool:
    return all(getattr(value, "is_ready", lambda: True)() for value in (*row.values(), skipped_in_row))
