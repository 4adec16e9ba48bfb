"""Reports that a run stands still, and where: the stacks of all threads."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from types import TracebackType

import jax

from relora_jax.run.goodput import UPDATES, Clock
from relora_jax.storage import atomic
from relora_jax.storage.writer import Writer

LEAST_S = 30.0  # a shorter wait is not worth a line
FIRST_S = 1800.0  # for what has not ended yet in this start: the first updates, a first evaluation, say
TIMES_LONGER = 10
EVERY_S = 1.0  # between two looks
_FIRST = 5  # looks that saw an update completed, until the median counts
_LAST = 100  # of these, of which the median is taken


class Stalls:
    """Watches the clock's completed updates, on a thread, inside its `with`.

    None for 10 times the median of their time, or 10 times as long as an evaluation, a save or another cause
    ever took: one line on stderr, and every process writes workdir/stacks-PROCESS.txt.
    """

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer, self._clock = writer, clock
        self._seconds = deque[float](maxlen=_LAST)  # of an update
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def __enter__(self) -> "Stalls":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        completed, cause, reported = self._clock.completed, self._clock.cause, False
        completed_at = since = time.monotonic()
        while not self._ended.wait(EVERY_S):
            now, count, current = time.monotonic(), self._clock.completed, self._clock.cause
            if current != cause or count != completed:
                if count != completed:
                    self._seconds.append((now - completed_at) / (count - completed))
                    completed, completed_at = count, now
                cause, since, reported = current, now, False
            elif not reported and now - since > self._limit_s(cause):
                reported = True
                self._report(now - completed_at, cause)

    def _limit_s(self, cause: str) -> float:
        if cause in (UPDATES, "data"):
            usual_s = statistics.median(self._seconds) if len(self._seconds) >= _FIRST else None
        else:
            usual_s = self._clock.longest.get(cause)
        return FIRST_S if usual_s is None else max(LEAST_S, TIMES_LONGER * usual_s)

    def _report(self, waited_s: float, cause: str) -> None:
        usual = f", usually {statistics.median(self._seconds):.2g} s" if self._seconds else ""
        text = f"{time.ctime()}: no update for {waited_s:.0f} s{usual} ({cause})"
        file = self._writer.folder / f"stacks-{jax.process_index()}.txt"
        try:
            atomic.write(file, f"{text}\n\n{stacks()}".encode())
            where = f"the stacks of all threads are in {file}"
        except OSError as error:  # the file system may be what stands still
            where = f"{file} cannot be written ({error})"
        self._writer.print(f"\n{text}: {where}", warning=True)


def stacks() -> str:
    """The stacks of all threads, by name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"Thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    )
