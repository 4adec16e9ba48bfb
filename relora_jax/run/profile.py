"""Traces some updates with JAX's profiler, for XProf and TensorBoard: `train.profile=START:STOP`."""

import tempfile
from types import TracebackType
from typing import Any

import jax

from relora_jax.errors import UserError
from relora_jax.run.goodput import Clock
from relora_jax.storage.location import AnyPath, file_system, is_remote
from relora_jax.storage.writer import Writer

FOLDER = "profile"


def parse(spec: str, *, updates: int) -> tuple[int, int] | None:
    """(first, end) of the updates to trace, counted from 0; None for "". UserError if `spec` is neither."""
    if not spec:
        return None
    start, _, stop = spec.partition(":")
    if not (start.isdecimal() and stop.isdecimal()) or not int(start) < int(stop) <= updates:
        raise UserError(
            f"train.profile {spec!r} must be START:STOP, two updates with START < STOP <= train.updates "
            f"{updates}, or ''"
        )
    return int(start), int(stop)


class Profile:
    """Traces the updates of `span` that this start computes, on process 0, into workdir/profile.

    The trace is ended with the `with`, too. Each start that computes any of the updates adds a trace.
    """

    def __init__(self, writer: Writer, clock: Clock, span: tuple[int, int] | None) -> None:
        self._writer, self._clock, self._span = writer, clock, span if writer.active else None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._tracing = False

    def before(self, u: int, ready: Any) -> None:
        """Before update u: starts the trace, once the array `ready`, of the update before, is computed."""
        if self._span and not self._tracing and self._span[0] <= u < self._span[1]:
            jax.block_until_ready(ready)
            try:
                with self._clock.spending("profile"):
                    jax.profiler.start_trace(self._folder())
                self._tracing = True
            except Exception as error:  # of any type, as in _stop
                self._span = None
                self._writer.print(f"warning: there is no trace of the profiler: {error}", warning=True)

    def after(self, updates: int, ready: Any) -> None:
        """After this many updates: ends the trace, once the array `ready`, of the last one, is computed."""
        if self._tracing and self._span and updates >= self._span[1]:
            jax.block_until_ready(ready)
            self._stop()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _folder(self) -> str:
        """The profiler writes to a disk only."""
        if not is_remote(self._target):
            return str(self._target)
        self._temporary = tempfile.TemporaryDirectory()
        return self._temporary.name

    def _stop(self) -> None:
        if not self._tracing:
            return
        self._tracing = False
        try:
            with self._clock.spending("profile"):
                jax.profiler.stop_trace()
                if self._temporary is not None:
                    with self._temporary as folder:
                        file_system(self._target).put(f"{folder}/", f"{self._target}/", recursive=True)
        except Exception as error:  # of any type: a trace must not end weeks of training
            self._writer.print(f"warning: there is no trace of the profiler: {error}", warning=True)
        else:
            self._writer.print(f"trace of the profiler in {self._target}: open it with xprof or TensorBoard")

    @property
    def _target(self) -> AnyPath:
        return self._writer.folder / FOLDER
