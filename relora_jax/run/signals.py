"""SIGTERM and SIGINT: the first asks to stop; the second, or the 25th second after it, ends the process.

Watched by a thread through `signal.set_wakeup_fd`, since a handler in Python waits for as long as the main
thread computes or compiles outside of Python.
"""

import os
import select
import signal
import socket
import threading
import time
from types import TracebackType

from relora_jax.errors import STOPPED

GRACE_S = 25.0  # supervisors kill 30 s after they ask
ONE_PRESS_S = 0.5  # a process group and its supervisor may each pass on the same request
NAMES = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """While inside (main thread): `asked` after the first signal; at the next the process ends with STOPPED.

    With `at_once`, True at first, the first signal ends it as well: set it to False where something is to be
    finished and saved. Ending so runs no clean-up: whatever is on the disk must be whole at any moment.
    """

    def __init__(self) -> None:
        self.asked, self.at_once = False, True

    def __enter__(self) -> "Signals":
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._handlers = {name: signal.signal(name, self._hear) for name in NAMES}
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

    def _hear(self, *_: object) -> None:
        """In the main thread, which need not wait for the other one to say it."""
        self.asked = True

    def _watch(self) -> None:
        if not self._wait(None):
            return
        asked_at, self.asked = time.monotonic(), True
        why = "at once"
        while not self.at_once:
            left_s = asked_at + GRACE_S - time.monotonic()
            why = f"after {GRACE_S:.0f} s, in which update and save did not end"
            if left_s <= 0:
                break
            again = self._wait(left_s)
            if again is False:
                return
            if again and time.monotonic() - asked_at > ONE_PRESS_S:
                why = "at the second signal"
                break
        os.write(2, f"\nstopped {why}: the same command goes on from the newest checkpoint\n".encode())
        os._exit(STOPPED)

    def _wait(self, timeout_s: float | None) -> bool | None:
        """True: one of NAMES came; False: the `with` ended; None: neither in that time."""
        ends = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = None if ends is None else max(ends - time.monotonic(), 0)
            if not select.select([self._read], [], [], left_s)[0]:
                return None
            numbers = self._read.recv(1)
            if numbers == b"\0":
                return False
            if numbers[0] in NAMES:
                return True
