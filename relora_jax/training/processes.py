"""Several processes of one run, on JAX's distributed runtime: how they start, agree and end.

Each process runs the same program over its own devices; process 0 writes. If one of them dies, the others
exit with STOPPED, since a collective operation without it would wait for ever. JAX itself would abort them.
"""

import contextlib
import ctypes
import functools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from relora_jax.errors import STOPPED, UserError
from relora_jax.storage.location import is_store_error

FLAGS = {"coordinator": "", "processes": "", "process": "", "heartbeat": "100"}
AGREE_TIMEOUT_S = 7 * 24 * 3600  # one process may prepare rows for days while the others wait
LEAVE_TIMEOUT_S = 10  # until one that failed alone leaves without the others
# no cluster is detected, or JAX has already started its devices, as a library
_NO_CLUSTER = ("coordinator_address should be defined", "must be called before any JAX calls")
_T = TypeVar("_T")
_joined = False
_Handler = ctypes.CFUNCTYPE(None)
_terminate: Any = None  # what ends the process after any other C++ exception than `_told_of_death`'s
_exit_code: int | None = None  # once the work is done and only the other processes are waited for
_heartbeat_s = 0


@contextlib.contextmanager
def joined(flags: dict[str, Any]) -> Iterator[Callable[[], None] | None]:
    """Yields what `start` returns; an unexpected error inside the `with` ends one of several processes."""
    request_stop = start(flags)
    try:
        yield request_stop
    except (UserError, OSError):
        raise
    except Exception as error:
        if not is_store_error(error):
            _fail(error)
        raise


def start(flags: dict[str, Any]) -> Callable[[], None] | None:
    """Joins the processes of `FLAGS`, or those of a cluster that JAX detects; before any other use of JAX.

    Returns a function that makes all processes stop at the same `should_stop`, or None if this is the only
    process. UserError if a flag is missing or wrong, ConnectionError if the others cannot be reached.
    """
    global _heartbeat_s, _joined
    own, _heartbeat_s = _check(flags), int(flags["heartbeat"])
    if own == {"num_processes": 1}:
        return None
    jax.config.update("jax_enable_recoverability", True)  # `_watch` reacts to a death, not an abort
    try:
        with warnings.catch_warnings(action="ignore"), _told_of_death():  # of a cluster detected in part
            jax.distributed.initialize(**own, heartbeat_timeout_seconds=_heartbeat_s)
    except Exception as error:
        if not own and any(text in str(error) for text in _NO_CLUSTER):
            return None
        reason = str(error).partition("\n")[0]
        reason = "not all of them answered" if reason == "std::bad_cast" else reason  # see `_told_of_death`
        others = "of --coordinator" if own else "of this cluster (--processes=1 needs none)"
        raise ConnectionError(f"the other processes {others} cannot be joined: {reason}") from error
    _joined = True
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    handler = libc.signal(signal.SIGTERM, None)  # JAX's; the caller sets its own, which may call this one
    if jax.process_count() == 1:
        return None
    threading.Thread(target=_watch, name="processes", daemon=True).start()
    return lambda: ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)(signal.SIGTERM)


def _check(flags: dict[str, Any]) -> dict[str, Any]:
    """The arguments of jax.distributed.initialize that the flags give: all, none, or a number of 1."""
    names = ("coordinator", "processes", "process")
    missing = [f"--{name}" for name in names if not flags[name]]
    for name in ("processes", "process", "heartbeat"):
        if flags[name] and not flags[name].isdecimal():
            raise UserError(f"--{name}={flags[name]} must be an integer of at least 0")
    if int(flags["heartbeat"]) < 3:
        raise UserError(f"--heartbeat={flags['heartbeat']} must be at least 3 seconds")
    if missing == ["--coordinator", "--process"] and flags["processes"] == "1":
        return {"num_processes": 1}
    if len(missing) == len(names):
        return {}
    if missing:
        raise UserError(f"missing {' and '.join(missing)}: pass --coordinator, --processes and --process")
    host, _, port = flags["coordinator"].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={flags['coordinator']} must be HOST:PORT of process 0")
    count, index = int(flags["processes"]), int(flags["process"])
    if index >= count:
        raise UserError(f"--process={index} must be below --processes={count}: they are numbered from 0")
    return {"coordinator_address": flags["coordinator"], "num_processes": count, "process_id": index}


def is_writer() -> bool:
    """Whether this process writes and prints for all."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """The text of each process, in order; every process must call it."""
    if jax.process_count() == 1:
        return [text]
    _wait("gather", timeout_s=AGREE_TIMEOUT_S)
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(content)))
    row = np.zeros(max(sizes), np.uint8)
    row[: len(content)] = content
    rows = multihost_utils.process_allgather(row)
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def together(step: Callable[[], _T], *errors: type[Exception]) -> _T:
    """The result of `step`, once it has ended on every process.

    If one raises a UserError, an OSError or one of `errors`, all raise one of that type, with its host.
    """
    if jax.process_count() == 1:
        return step()
    kinds, result, error = (*errors, UserError, OSError), None, None
    try:
        result = step()
    except kinds as raised:
        error = raised
    kind = next((k for k, kind in enumerate(kinds) if error and isinstance(error, kind)), -1)
    answers = [json.loads(text) for text in gather(json.dumps([kind, socket.gethostname(), str(error)]))]
    for process, (kind, host, message) in enumerate(answers):
        if kind >= 0:
            raise kinds[kind](f"process {process} on {host}: {message}") from error
    return result  # pyright: ignore


def agree(facts: dict[str, Any]) -> None:
    """UserError, on every process, if one has other facts than process 0; it is named with its host."""
    texts = gather(json.dumps({"host": socket.gethostname(), **facts}, sort_keys=True))
    first, *others = [json.loads(text) for text in texts]
    for process, own in enumerate(others, 1):
        changed = [f"{k}: {first[k]} -> {own[k]}" for k in first if k != "host" and first[k] != own[k]]
        if changed:
            raise UserError(
                f"process {process} on {own['host']} differs from process 0 on {first['host']} "
                f"({'; '.join(changed)}): start all processes with the same command, code and text"
            )


def from_writer(value: int) -> int:
    """The value of process 0."""
    return value if jax.process_count() == 1 else int(gather(str(value))[0])


def leave(code: int) -> None:
    """Exits with `code`; if this is one of several processes, all of them should leave now.

    They do so without the interpreter's own end, in which JAX waits for processes that may be dead.
    """
    global _exit_code
    if not jax.distributed.is_initialized():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    _exit_code = code
    if not _joined:
        os._exit(code)  # JAX would wait for the others
    with contextlib.suppress(Exception):
        _wait("leave", timeout_s=LEAVE_TIMEOUT_S)
    if is_writer():
        time.sleep(1)  # it serves the others, which would abort without it
    os._exit(code)


def _fail(error: Exception) -> None:
    """Ends this process after an unexpected error, if it is one of several: by the death of another, or 1."""
    if not jax.distributed.is_initialized():
        return
    if _may_be_a_death(error):
        time.sleep(_heartbeat_s + 5)  # `_watch` exits if a process has died
    traceback.print_exception(error)
    sys.stderr.flush()
    os._exit(1)


def _may_be_a_death(error: Exception) -> bool:
    """Whether the error is one of XLA: a JaxRuntimeError, or a ValueError, that begins with a status."""
    status = re.match(r"([A-Z_]{5,}): ", str(error))
    return status is not None and status[1] != "RESOURCE_EXHAUSTED"


def _wait(name: str, *, timeout_s: int) -> None:
    """Waits until every process is here, without a computation, which would not wait so long."""
    every = set(range(jax.process_count()))
    ocp.multihost.sync_global_processes(f"relora_jax:{name}", timeout=timeout_s, processes=every)


def _watch() -> None:
    """Exits with STOPPED as soon as another process is dead."""
    while True:
        try:
            with multihost_utils.live_devices(jax.devices()):
                time.sleep(1)
        except multihost_utils.ProcessFailureError as error:
            dead = sorted({device.process_index for device in error.failed_devices})
            _exit(f"process {', '.join(map(str, dead))} died")
        except Exception:
            _exit("process 0 died")


@contextlib.contextmanager
def _told_of_death() -> Iterator[None]:
    """Inside, JAX's client is made so that it calls `_on_death` instead of aborting without process 0.

    JAX passes on no callback of ours, and the status that one gets cannot be converted for Python. The C++
    exception of that attempt is the news: it ends in std::terminate. Where JAX or the C++ library has other
    names, JAX aborts.
    """
    global _terminate
    try:
        from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

        make_client = functools.partial(
            _jax.get_distributed_runtime_client, missed_heartbeat_callback=_on_death
        )
        library = ctypes.CDLL("libstdc++.so.6")
        library._ZSt13set_terminatePFvvE.restype = _Handler
    except (ImportError, AttributeError, OSError):
        yield
        return
    with mock.patch.object(_jax, "get_distributed_runtime_client", make_client):
        yield
    _terminate = library._ZSt13set_terminatePFvvE(_on_death)


@_Handler
def _on_death() -> None:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_current_exception_type.restype = ctypes.c_void_p
    bad_cast = ctypes.addressof(ctypes.c_char.in_dll(library, "_ZTISt8bad_cast"))
    if library.__cxa_current_exception_type() != bad_cast:
        _terminate()
    _exit("process 0 died")


def _exit(event: str) -> None:
    if _exit_code is None:
        os.write(2, f"\n{event}: run the same command again in all processes to resume\n".encode())
    os._exit(STOPPED if _exit_code is None else _exit_code)
