"""A lock in an object store: a marker with a holder's name, which the holder refreshes.

    free -> create, unless it exists -> refresh every REFRESH_S -> remove at the end

A marker that is not refreshed for STALE_S, or whose process is gone from this machine, is from a killed
process and is replaced. A holder that was cut off for so long that another one replaced its marker ends
itself as soon as it reads that. Until then both may write.
"""

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from relora_jax.errors import BAD_SETTING
from relora_jax.storage.location import file_system, store_errors_as_os_errors

REFRESH_S = 20.0
STALE_S = 120.0  # some refreshes may fail: the network may be down for a minute
POLL_S = 2.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # names may be shared, such as localhost


@contextlib.contextmanager
def leased(file: epath.Path, *, busy: Callable[[str], object]) -> Iterator[None]:
    """Holds the marker `file` inside the `with`; calls `busy(its holder)`, which raises, if another does."""
    me = {"process": os.getpid(), "machine": _machine(), "id": uuid.uuid4().hex}
    with store_errors_as_os_errors(file):
        if holder := _read(file):
            if not _is_gone(holder):
                _wait_until_stale(file, holder, busy)
            file.unlink(missing_ok=True)
        try:
            file_system(file).pipe_file(str(file), _text(me, 0), mode="create")
        except FileExistsError:
            busy(_name(_read(file) or {}))
    ended = threading.Event()
    thread = threading.Thread(target=_refresh, args=(file, me, ended), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(Exception):  # the store fails: the marker becomes stale
            if (_read(file) or {}).get("id") == me["id"]:
                file.unlink(missing_ok=True)


def _wait_until_stale(file: epath.Path, holder: dict[str, Any], busy: Callable[[str], object]) -> None:
    """Returns once the marker is removed, or was not refreshed for STALE_S; else `busy`."""
    print(
        f"{file} is held by process {_name(holder)}: waiting up to {STALE_S:.0f} s to see if it still runs",
        file=sys.stderr,
        flush=True,
    )
    deadline = time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        if (now := _read(file)) is None:
            return
        if now != holder:
            busy(_name(now))


def _refresh(file: epath.Path, me: dict[str, Any], ended: threading.Event) -> None:
    """Writes the marker again and again until `ended`; exits the process if another one holds it."""
    for number in itertools.count(1):
        if ended.wait(REFRESH_S):
            return
        try:
            holder = _read(file) or me  # if it was removed by hand, it is written again
            if holder["id"] == me["id"]:
                file_system(file).pipe_file(str(file), _text(me, number))
                continue
        except Exception:  # of any type: the store fails, and the next time may go well
            continue
        message = f"\nerror: {file} was taken over by process {_name(holder)}: this process ends\n"
        os.write(2, message.encode())
        os._exit(BAD_SETTING)


def _read(file: epath.Path) -> dict[str, Any] | None:
    """The marker's content; None if there is none."""
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        content = None
    return content if isinstance(content, dict) else {}


def _text(me: dict[str, Any], number: int) -> bytes:
    return (json.dumps({**me, "refreshed": number}) + "\n").encode()


def _name(holder: dict[str, Any]) -> str:
    return f"{holder.get('process', '?')} on {str(holder.get('machine', '?')).partition(' ')[0]}"


def _machine() -> str:
    """The name of this machine and the id of its boot."""
    boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
    return f"{socket.gethostname()} {boot}"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that no longer exists.

    A process with this one's pid was this one's predecessor in a container, where pids start at 1.
    """
    process = holder.get("process")
    if holder.get("machine") != _machine() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return process == os.getpid()
