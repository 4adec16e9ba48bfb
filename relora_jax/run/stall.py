"""Reports that a run stands still, and where: the stacks of all threads."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from types import TracebackType

import jax

from relora_jax.run.goodput import Clock
from relora_jax.storage import atomic
from relora_jax.storage.writer import Writer

TIMES_THE_MEDIAN = 10
LEAST_S = 30.0  # a shorter wait is not worth a line
EVERY_S = 1.0  # between two looks
_LAST = 100  # updates of which the median is taken
_FIRST = 5  # updates until it is


class Stalls:
    """Watches the time between calls of `update`, on a thread, inside its `with`.

    No call for 10 times the median of that time, and for longer than ever before (an evaluation, or the
    compilation before the first one, may take long): one line on stderr, and every process writes
    workdir/stacks-PROCESS.txt.
    """

    def __init__(self, writer: Writer, clock: Clock) -> None:
        self._writer, self._clock = writer, clock
        self._between = deque[float](maxlen=_LAST)
        self._longest, self._last, self._reported = LEAST_S, time.monotonic(), False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def update(self) -> None:
        """An update was dispatched."""
        now = time.monotonic()
        self._between.append(now - self._last)
        if not self._reported:
            self._longest = max(self._longest, now - self._last)
        self._last, self._reported = now, False

    def __enter__(self) -> "Stalls":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            waited_s = time.monotonic() - self._last
            if not self._reported and len(self._between) >= _FIRST and waited_s > self._limit_s():
                self._reported = True
                self._report(waited_s)

    def _limit_s(self) -> float:
        return max(self._longest, TIMES_THE_MEDIAN * statistics.median(self._between))

    def _report(self, waited_s: float) -> None:
        median_s, doing = statistics.median(self._between), self._clock.cause
        text = f"{time.ctime()}: no update for {waited_s:.0f} s, usually {median_s:.2g} s ({doing})"
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
