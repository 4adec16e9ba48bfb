"""Writes a run's rows as TensorBoard event files, with tensorboardX's protocol buffers."""

import time
from typing import Any

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore  (generated at import)

from relora_jax.storage.location import AnyPath, is_remote

FLUSH_S = 30.0  # a flush is an fsync: too slow for every row; in an object store, it writes all rows again
_NOT_CURVES = ("kind", "update", "elapsed_s")


class Board:
    """Writes event files; TensorBoard hides points of earlier starts at `purge_step` or later.

    The first row opens the file. Writes in the caller's thread: SummaryWriter hangs once its own thread
    died of a full disk.
    """

    def __init__(self, folder: AnyPath, *, purge_step: int) -> None:
        self._folder, self._purge_step = folder, purge_step
        self._writer: EventsWriter | None = None
        self._flushed_at = time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Writes the row's `curves` at step `update`."""
        points = curves(row)
        if not points:
            return
        if self._writer is None:
            self._writer = self._open(min(self._purge_step, row["update"]))
        for name, value in points.items():
            scalar = summary.scalar(name, value)
            self._writer.write_event(Event(step=row["update"], wall_time=time.time(), summary=scalar))
        if time.monotonic() - self._flushed_at > FLUSH_S and not is_remote(self._folder):
            self.flush()

    def flush(self) -> None:
        """Flushes all points to the disk."""
        self._flushed_at = time.monotonic()
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is not None:
            self._writer.close()
        self._writer = None  # tensorboardX's writer to gs:// writes once more when it is deleted

    def _open(self, purge_step: int) -> EventsWriter:
        self._folder.mkdir(exist_ok=True)  # nothing in an object store
        # the name contains the time in seconds: the step distinguishes two starts within one
        writer = EventsWriter(str(self._folder / "events"), f".from_{purge_step}")
        start = SessionLog(status=SessionLog.START)
        writer.write_event(Event(step=purge_step, wall_time=time.time(), session_log=start))
        return writer


def curves(row: dict[str, Any]) -> dict[str, float]:
    """{curve name: value} of a row's finite numbers; {} for restarts, which the train rows count."""
    group = {"train": "train", "eval": "validation"}.get(row["kind"])
    if group is None:
        return {}
    values = {key: value for key, value in row.items() if key not in _NOT_CURVES and value is not None}
    return {f"{group}/{key}": value for key, value in values.items()}
