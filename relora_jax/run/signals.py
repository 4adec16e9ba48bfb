"""SIGTERM and SIGINT: the first requests a stop; a second one, or 25 s later, the process exits.

A thread watches for them with `signal.set_wakeup_fd`, because a Python handler does not run while the main
thread computes or compiles outside of Python.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

from jax.experimental import multihost_utils

from relora_jax.errors import STOPPED

GRACE_S = 25.0  # supervisors usually kill after 30 s
ONE_PRESS_S = 0.5  # the terminal and a supervisor may both deliver the same Ctrl-C
NAMES = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """Sets `stop_requested` at the first signal, and exits with STOPPED at the second (main thread only).

    While `exit_immediately` (at first True), the first signal exits, too: set it to False once there is work
    to finish and save. The exit runs no clean-up, so files must be intact at any moment.

    If this is one of several processes, `request_stop` asks all of them to stop.
    """

    def __init__(self, request_stop: Callable[[], None] | None = None) -> None:
        self.stop_requested, self.exit_immediately = False, True
        self._request_stop, self._asked, self._stop_together = request_stop, 0, False

    def should_stop(self) -> bool:
        """Whether to stop now. Several processes must ask equally often; all get the same answers."""
        if self._request_stop is None:
            return self.stop_requested
        if not self._stop_together:
            self._asked += 1
            self._stop_together = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._stop_together

    def __enter__(self) -> "Signals":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._handlers = {name: signal.signal(name, self._handle) for name in NAMES}
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for name, handler in self._handlers.items():
            signal.signal(name, handler)
        self._write.send(b"\0")
        self._thread.join()
        self._read.close()
        self._write.close()

    def _handle(self, *_: object) -> None:
        """Runs in the main thread, which need not wait for the watching one to set it."""
        self.stop_requested = True

    def _watch(self) -> None:
        if not self._wait(None):
            return
        requested_at, self.stop_requested = time.monotonic(), True
        if self._request_stop and not self.exit_immediately:
            self._request_stop()
        reason = "immediately"
        while not self.exit_immediately:
            left_s = requested_at + GRACE_S - time.monotonic()
            reason = f"after {GRACE_S:.0f} s, before the update was finished, saved and read back"
            if left_s <= 0:
                break
            again = self._wait(left_s)
            if again is False:
                return
            if again and time.monotonic() - requested_at > ONE_PRESS_S:
                reason = "at the second signal"
                break
        message = f"\nstopped {reason}: run the same command again to resume from the newest checkpoint\n"
        os.write(2, message.encode())
        os._exit(STOPPED)

    def _wait(self, timeout_s: float | None) -> bool | None:
        """True: one of NAMES came; False: the `with` ended; None: timeout."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0)
            if not select.select([self._read], [], [], left_s)[0]:
                return None
            numbers = self._read.recv(1)
            if numbers == b"\0":
                return False
            if numbers[0] in NAMES:
                return True
