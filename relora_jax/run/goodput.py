"""Where a run's wall-clock time goes: into its updates, or into one of CAUSES.

    start       rows, checkpoint and devices are opened; the imports before that are not counted
    compile     JAX traces and compiles, or loads a compiled program, whenever that is
    data        the devices wait for a batch
    evaluation  of held-out text, and samples
    save        the state is copied for a checkpoint, which is then written while updates go on
    restart     and the start of the low-rank phase
    profile     the profiler starts and writes its trace
    redone      updates after the newest checkpoint, lost to a kill and done again

time.jsonl in the workdir has a row per checkpoint and per minute: `elapsed_s`, the total time of all starts
of the run, and `lost_s`, how much of it went to each cause. What remains went to updates; their share is the
goodput. Of a start that dies before its first row, nothing is known.
"""

import contextlib
import dataclasses
import functools
import json
import math
import queue
import threading
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

    def add(self, event: str, duration_secs: float, **_: Any) -> None:
        """An event that has just ended; of nested ones, the outer comes last."""
        if "/compile/" in event:
            end = _now()
            start = end - duration_secs
            self._spans = [span for span in self._spans if span[0] < start] + [(start, end)]

    def seconds(self) -> float:
        return sum(end - start for start, end in self._spans)


@functools.cache
def _compilations() -> _Compilations:
    import jax  # here: it is slow to import, and reports need none

    compilations = _Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations.add)
    return compilations


class _Devices:
    """Since when the devices have had nothing to compute, seen by a thread."""

    def __init__(self) -> None:
        self._outputs, self.done = queue.SimpleQueue[Any](), 0
        self._given, self._idle_since = 0, -math.inf
        self._thread = threading.Thread(target=self._watch, name="devices", daemon=True)

    def compute(self, output: Any) -> None:
        """They will have computed this array, the newest, when it is ready; None ends the thread."""
        if not self._given:
            self._thread.start()
        self._given += 1
        self._outputs.put(output)

    def idle_since(self) -> float:
        """The time, infinite as long as they compute."""
        return self._idle_since if self._given == self.done else math.inf

    def _watch(self) -> None:
        for output in iter(self._outputs.get, None):
            with contextlib.suppress(Exception):  # whoever reads the output sees it
                output.block_until_ready()
            self._idle_since = _now()
            self.done += 1


class Clock:
    """Charges the time of this start to updates and causes; begins with `start`.

    `earlier` is what earlier starts took (see `cut`), `cause` what the time is charged to now, `longest` the
    seconds that each cause took at most until it ended.
    """

    def __init__(self) -> None:
        self.spent: dict[str, float] = dict.fromkeys((UPDATES, *CAUSES), 0.0)  # seconds of this start
        self.cause, self.earlier, self.longest = "start", Times(), dict[str, float]()
        self._began = self._since = _now()
        self._compiled = _compilations().seconds()
        self._devices = _Devices()

    def begin(self, cause: str) -> None:
        """Charges the time from now on to updates, or to a cause."""
        self._charge()
        self.longest[self.cause] = max(self.longest.get(self.cause, 0.0), self._since - self._began)
        self.cause, self._began = cause, self._since

    @contextlib.contextmanager
    def spending(self, cause: str) -> Iterator[None]:
        """Charges the time inside to a cause, unless it is inside another one."""
        if self.cause != UPDATES:
            yield
            return
        self.begin(cause)
        try:
            yield
        finally:
            self.begin(UPDATES)

    def batches(self, batches: Iterator[_T]) -> Iterator[_T]:
        """The batches. Waiting for one is charged to `data` while the devices have nothing to compute."""
        try:
            while True:
                with self.spending("data"):
                    began, batch = _now(), next(batches, None)
                waited_s = _now() - began
                computing_s = min(max(self._devices.idle_since() - began, 0.0), waited_s)
                self.spent["data"] -= computing_s
                self.spent[UPDATES] += computing_s
                if batch is None:
                    return
                yield batch
        finally:
            self._devices.compute(None)

    def computing(self, output: Any) -> None:
        """The devices compute this array, of the newest update."""
        self._devices.compute(output)

    @property
    def completed(self) -> int:
        """The updates of this start that the devices have completed."""
        return self._devices.done

    def training_s(self) -> float:
        """Seconds of this start for updates and their data: what tokens per second are measured over."""
        self._charge()
        return self.spent[UPDATES] + self.spent["data"]

    def times(self) -> "Times":
        """All starts together."""
        self._charge()
        lost = {cause: self.spent[cause] + self.earlier.lost_s.get(cause, 0.0) for cause in CAUSES}
        return Times(self.earlier.elapsed_s + sum(self.spent.values()), lost)

    def _charge(self) -> None:
        now, compiled = _now(), _compilations().seconds()
        passed = now - self._since
        compiling = min(compiled - self._compiled, passed)
        self.spent["compile"] += compiling
        self.spent[self.cause] += passed - compiling
        self._since, self._compiled = now, compiled


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
    """The newest times of a run; zero if it has none."""
    rows = _valid(metrics_file.read(workdir, FILE))
    return Times(rows[-1]["elapsed_s"], rows[-1]["lost_s"]) if rows else Times()


def cut(writer: Writer, restored_update: int, train_rows: list[metrics_file.Row]) -> Times:
    """Cuts time.jsonl like `metrics_file.cut`; the times until now, with what was lost as `redone`.

    `train_rows`: those of all earlier starts, before they were cut; their `elapsed_s` may be later.
    """
    train_rows = [row for row in train_rows if _numbers(row.get("elapsed_s"))]
    every = [*_valid(metrics_file.read(writer.folder, FILE)), *train_rows]
    kept = _valid(metrics_file.cut(writer, restored_update, FILE))
    saved_s = [row["elapsed_s"] for row in (*kept, *train_rows) if row["update"] <= restored_update]
    elapsed_s = max((row["elapsed_s"] for row in every), default=0.0)
    lost_s = dict(kept[-1]["lost_s"]) if kept else {}
    lost_s["redone"] = lost_s.get("redone", 0.0) + elapsed_s - max(saved_s, default=0.0)
    return Times(elapsed_s, lost_s)


def _valid(rows: list[metrics_file.Row]) -> list[metrics_file.Row]:
    """Without rows that somebody has edited."""
    return [row for row in rows if _numbers(row.get("elapsed_s")) and _numbers(row.get("lost_s"), dict)]


def _numbers(value: Any, kind: Any = int | float) -> bool:
    values = value.values() if isinstance(value, dict) else [value]
    return isinstance(value, kind) and all(isinstance(number, int | float) for number in values)
