"""Runs the same work on many tasks, in worker processes or in this one, and yields its messages as they come.

`work(task)` yields messages. A UserError in a worker is raised here with the same message; workers exit with
the process that started them, however it ends.
"""

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple, TypeVar, cast

from relora_jax.errors import UserError

Task = TypeVar("Task")
_DONE = None


class _Failure(NamedTuple):
    """Why a worker ended: the error if a user can fix it, and the traceback."""

    error: BaseException | None
    trace: str


def cpus() -> int:
    """Number of CPUs that this process may use, if the system reports it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Callable[[Task], Iterator[Any]], tasks: Sequence[Task], workers: int
) -> Generator[Any, None, None]:
    """The messages of work(task) for each task, started in order; with one worker, in this process.

    Closing the generator ends the workers at once.
    """
    if min(workers, len(tasks)) < 2:
        for task in tasks:
            yield from work(task)
        return
    queue = iter(tasks)
    processes: dict[Any, Any] = {}
    try:
        for task in [next(queue) for _ in range(min(workers, len(tasks)))]:
            pipe, process = _start(work)
            processes[pipe] = process
            pipe.send(task)
        busy = list(processes)
        while busy:
            for pipe in cast(list[Any], connection.wait(busy)):
                message = _receive(pipe, processes[pipe])
                if message is not _DONE:
                    yield message
                elif (task := next(queue, None)) is None:
                    busy.remove(pipe)
                else:
                    pipe.send(task)
    finally:
        for process in processes.values():
            process.terminate()
        for pipe, process in processes.items():
            process.join()
            pipe.close()


def _start(work: Callable[[Any], Iterator[Any]]) -> tuple[Any, Any]:
    """(pipe, process) of a new worker, which ignores Ctrl-C: only this process handles it."""
    context = multiprocessing.get_context("spawn")  # JAX and gRPC threads do not survive a fork
    ours, theirs = context.Pipe()
    resource_tracker.ensure_running()  # which would otherwise unblock SIGINT in start()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    return ours, process


def _receive(pipe: Any, process: Any) -> Any:
    try:
        message = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise OSError(
            f"a worker process was killed (exit code {process.exitcode}), perhaps for lack of memory: run "
            "the same command again to continue, with fewer --workers if needed"
        ) from None
    if not isinstance(message, _Failure):
        return message
    if message.error is not None:
        raise message.error
    raise RuntimeError(f"a worker failed\n{message.trace}")


def _serve(pipe: Any, work: Callable[[Any], Iterator[Any]]) -> None:
    """Receives tasks and sends messages until the pipe is closed."""
    try:
        while True:
            task = pipe.recv()
            try:
                for message in work(task):
                    pipe.send(message)
                pipe.send(_DONE)
            except (BrokenPipeError, ConnectionResetError):
                return
            except Exception as error:
                fixable = isinstance(error, OSError | UserError)
                pipe.send(_Failure(error if fixable else None, traceback.format_exc()))
                return
    except (EOFError, OSError):
        return
