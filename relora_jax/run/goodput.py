"""Where a run's wall-clock time goes: into its updates, or into one of CAUSES.

    start       rows, checkpoint and devices are opened; the imports before that are not counted
    compile     JAX traces and compiles, or loads a compiled program, whenever that is
    data        the devices wait for a batch
    evaluation  of held-out text, and samples
    save        the state is copied for a checkpoint, which is then written while updates go on
    restart     and the start of the low-rank phase
    profile     the profiler starts and writes its trace
    redone      updates after the newest checkpoint, lost to a kill and done again

time.jsonl in the workdir has a row per checkpoint: `elapsed_s`, the total time of all starts of the run, and
`lost_s`, how much of it went to each cause. What remains went to updates; their share is the goodput.
"""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from typing import Any, TypeVar

from relora_jax.run import metrics_file
from relora_jax.storage.location import AnyPath
from relora_jax.storage.writer import Writer

FILE = "time.jsonl"
CAUSES = ("start", "compile", "data", "evaluation", "save", "restart", "profile", "redone")
UPDATES = "updates"
_now = time.perf_counter
_T = TypeVar("_T")


class _Compilations:
    """The total time of all compilations so far, from JAX's own events."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def add(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        """An event; of nested ones, the outer comes last."""
        if "/compile/" in event:
            self._spans = [span for span in self._spans if span[0] < start_time] + [(start_time, end_time)]

    def seconds(self) -> float:
        return sum(end - start for start, end in self._spans)


@functools.cache
def _compilations() -> _Compilations:
    import jax  # here: it is slow to import, and reports need none

    compilations = _Compilations()
    jax.monitoring.register_event_time_span_listener(compilations.add)
    return compilations


class Clock:
    """Charges the time of this start to updates and causes; begins with `start`.

    `earlier` is what earlier starts took (see `cut`).
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys((UPDATES, *CAUSES), 0.0)  # seconds of this start
        self.cause, self.earlier = "start", Times()
        self._since, self._compiled = _now(), _compilations().seconds()
        self._computing: Any = None

    def begin_updates(self) -> None:
        """Ends the start."""
        self._switch(UPDATES)

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Charges the time inside to a cause, unless it is inside another one."""
        if self.cause != UPDATES:
            yield
            return
        self._switch(cause)
        try:
            yield
        finally:
            self._switch(UPDATES)

    def batches(self, batches: Iterator[_T]) -> Iterator[_T]:
        """The batches. Waiting for one is charged to `data` if the devices had nothing left to compute."""
        while True:
            with self.spending("data"):
                batch = next(batches, None)
                if self._computing is not None and not self._computing.is_ready():
                    self.cause = UPDATES
            if batch is None:
                return
            yield batch

    def computing(self, output: Any) -> None:
        """The devices compute this array, the newest."""
        self._computing = output

    @property
    def training_s(self) -> float:
        """Seconds of this start for updates and their data: what tokens per second are measured over."""
        self._switch(self.cause)
        return self.spent[UPDATES] + self.spent["data"]

    def times(self) -> "Times":
        """All starts together."""
        self._switch(self.cause)
        lost = {cause: self.spent[cause] + self.earlier.lost_s.get(cause, 0.0) for cause in CAUSES}
        return Times(self.earlier.elapsed_s + sum(self.spent.values()), lost)

    def _switch(self, cause: str) -> None:
        now, compiled = _now(), _compilations().seconds()
        passed = now - self._since
        compiling = min(compiled - self._compiled, passed)
        self.spent["compile"] += compiling
        self.spent[self.cause] += passed - compiling
        self.cause, self._since, self._compiled = cause, now, compiled


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of a run: in total, and lost to each of CAUSES."""

    elapsed_s: float = 0.0
    lost_s: dict[str, float] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """The shares of updates and of the causes, the largest first, without those of less than 0.1%."""
        if not self.elapsed_s:
            return "-"
        shares = {cause: 100 * seconds / self.elapsed_s for cause, seconds in self.lost_s.items()}
        parts = [f"{100 - sum(shares.values()):.1f}% in updates"]
        parts += [f"{cause} {shares[cause]:.1f}%" for cause in sorted(shares, key=lambda c: -shares[c])]
        return ", ".join(part for part in parts if not part.endswith(" 0.0%"))

    def row(self, update: int) -> str:
        """A line of time.jsonl."""
        lost_s = {cause: round(seconds, 3) for cause, seconds in self.lost_s.items()}
        return json.dumps(
            {"kind": "time", "update": update, "elapsed_s": round(self.elapsed_s, 3), "lost_s": lost_s}
        )


def read(workdir: AnyPath) -> Times:
    """The times at the newest checkpoint of a run; zero without one."""
    rows = metrics_file.read(workdir, FILE)
    return Times(rows[-1]["elapsed_s"], rows[-1]["lost_s"]) if rows else Times()


def cut(writer: Writer, restored_update: int, train_rows: list[metrics_file.Row]) -> Times:
    """Cuts time.jsonl like `metrics_file.cut`; the times until now, with what was lost as `redone`.

    `train_rows`: those of all earlier starts, before they were cut; their `elapsed_s` may be later.
    """
    every = [*metrics_file.read(writer.folder, FILE), *train_rows]
    kept = metrics_file.cut(writer, restored_update, FILE)
    saved_s = [row["elapsed_s"] for row in (*kept, *train_rows) if row["update"] <= restored_update]
    elapsed_s = max((row["elapsed_s"] for row in every), default=0.0)
    lost_s = dict(kept[-1]["lost_s"]) if kept else {}
    lost_s["redone"] = lost_s.get("redone", 0.0) + elapsed_s - max(saved_s, default=0.0)
    return Times(elapsed_s, lost_s)
