"""The same work on many tasks, in processes or in this one: what it says comes as it is said.

`work(task)` gives messages. A UserError in a process comes out as the same line; workers end with
the one who asked, however that ends.
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
    """Why a worker ended: the error where a user can mend it, else its trace."""

    error: BaseException | None
    trace: str


def cpus() -> int:
    """CPUs that this process may use, where the system tells: as many workers are enough."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    work: Callable[[Task], Iterator[Any]], tasks: Sequence[Task], workers: int
) -> Generator[Any, None, None]:
    """The messages of work(task) for each task, begun in this order; by one worker: in this process.

    Closing the iterator ends the workers at once.
    """
    if min(workers, len(tasks)) < 2:
        for task in tasks:
            yield from work(task)
        return
    left = iter(tasks)
    processes: dict[Any, Any] = {}
    try:
        for task in [next(left) for _ in range(min(workers, len(tasks)))]:
            pipe, process = _start(work)
            processes[pipe] = process
            pipe.send(task)
        busy = list(processes)
        while busy:
            for pipe in cast(list[Any], connection.wait(busy)):
                message = _receive(pipe, processes[pipe])
                if message is not _DONE:
                    yield message
                elif (task := next(left, None)) is None:
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
    """A process of its own interpreter; Ctrl-C reaches us alone, and we end it."""
    context = multiprocessing.get_context("spawn")  # JAX and gRPC threads do not survive a fork
    ours, theirs = context.Pipe()
    resource_tracker.ensure_running()  # which would unblock SIGINT again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return ours, process


def _receive(pipe: Any, process: Any) -> Any:
    try:
        message = pipe.recv()
    except (EOFError, ConnectionError):
        process.join()
        raise OSError(
            f"a worker process was ended from outside (exit code {process.exitcode}), as where memory runs "
            "out: the same command goes on, with fewer --workers if need be"
        ) from None
    if not isinstance(message, _Failure):
        return message
    if isinstance(message.error, UserError):
        raise UserError(str(message.error))
    if isinstance(message.error, OSError):
        raise message.error
    raise RuntimeError(f"a worker failed\n{message.trace}")


def _serve(pipe: Any, work: Callable[[Any], Iterator[Any]]) -> None:
    """Tasks from the pipe, messages back, until nobody is there."""
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
