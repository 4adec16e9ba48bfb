"""A run's progress line, and notes above it.

On a terminal the line is redrawn in place (tqdm). Anywhere else it is plain text without control characters:
the first row immediately, then at most one line per `EVERY_S` seconds, and always the last row.
"""

import io
import math
import shutil
import time
from collections import deque
from typing import Any, TextIO

from tqdm import tqdm

from relora_jax.run.format import describe

EVERY_S = 10.0
_REDRAW_S = 0.1
_PACE_ROWS = 50

Stream = TextIO | io.TextIOBase  # io.StringIO is not a TextIO


class _Bar(tqdm):
    monitor_interval = 0  # no monitor thread: the line is redrawn when a row arrives


class Progress:
    """The line of a run of `updates` updates that begins after update `start`."""

    def __init__(self, stream: Stream, *, updates: int, start: int) -> None:
        self._stream, self._updates = stream, updates
        self._rows: deque[tuple[int, float]] = deque(maxlen=_PACE_ROWS)
        self._pending = ""
        self._shown_at = -math.inf
        self._bar = None
        if stream.isatty():
            bar_format = "{n_fmt}/{total_fmt} |{bar}| {desc}"
            columns, lines = shutil.get_terminal_size()
            self._bar = _Bar(
                total=updates, initial=start, file=stream, bar_format=bar_format, ncols=columns, nrows=lines
            )
            # tqdm's own function hides the line if the terminal reports no size (0 x 0)
            self._bar.dynamic_ncols = lambda _: shutil.get_terminal_size()
            self._bar.set_description_str("compiling")

    def show(self, row: dict[str, Any]) -> None:
        """Shows a train row, now or when the next line is due."""
        now = time.monotonic()
        self._rows.append((row["update"], now))
        parts = describe(row, left_s=self._left_s())
        if self._bar is None:
            self._pending = "  ".join([f"update {row['update']}/{self._updates}", *parts])
        else:
            self._pending = " ".join(parts)  # fits into 80 columns
            self._bar.n = row["update"]
        wait_s = EVERY_S if self._bar is None else _REDRAW_S
        if now - self._shown_at >= wait_s or row["update"] >= self._updates:
            self._draw(now)

    def note(self, text: str) -> None:
        """Prints a permanent line above the progress line."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last pending row and moves the cursor to a new line."""
        if self._pending:
            self._draw(time.monotonic())
        if self._bar is not None:
            self._bar.close()

    def _draw(self, now: float) -> None:
        if self._bar is None:
            print(self._pending, file=self._stream, flush=True)
        else:
            self._bar.set_description_str(self._pending)
        self._pending, self._shown_at = "", now

    def _left_s(self) -> float:
        """Remaining updates times the recent seconds per update, including evaluations and saves.

        The time before the first row is excluded, as it includes compilation. NaN before the second row.
        """
        (first, start), (last, now) = self._rows[0], self._rows[-1]
        if last == first:
            return 0.0 if last >= self._updates else math.nan
        return (self._updates - last) * (now - start) / (last - first)
