"""Runs of a study side by side, each in a process of its own: one that diverges or dies harms no other."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from relora_jax.config import Config, changed_results, to_json
from relora_jax.errors import BAD_SETTING, DIVERGED, UserError
from relora_jax.run import metrics_file, record
from relora_jax.storage import atomic

POLL_S = 0.5


class FailedError(OSError):
    """A run ended with an error that is neither a divergence nor a signal."""


class Slot(NamedTuple):
    """What one of the runs side by side may use."""

    cores: frozenset[int] = frozenset()  # empty: all
    environment: tuple[tuple[str, str], ...] = ()


def slots(jobs: int) -> list[Slot]:
    """What each of `jobs` runs may use, the cores or GPUs shared evenly; jobs=0: as many as make sense.

    That is one for each CPU core or GPU; on other devices, which one process holds, a single one.
    """
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    platform, _, devices = printed.stdout.partition(" ")
    if platform == "gpu":
        ids = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        ids = ids if ids != [""] else [str(n) for n in range(int(devices))]
        return [Slot(environment=(("CUDA_VISIBLE_DEVICES", n),)) for n in ids[: jobs or len(ids)]]
    if platform != "cpu" or not hasattr(os, "sched_setaffinity"):
        return [Slot()] * max(jobs, 1)
    cores = sorted(os.sched_getaffinity(0))
    jobs = jobs or len(cores)
    return [Slot(frozenset(cores[n::jobs] or cores)) for n in range(jobs)]


def run_all(
    runs: dict[Path, Config],
    slots: Sequence[Slot],
    *,
    total: int,
    done: int,
    ended: Callable[[Path, str], str],
) -> None:
    """Trains every run {workdir: config} to its end; `ended(workdir, outcome)` gives a line for the terminal.

    The outcome is "finished" or "diverged". `total` and `done` count the runs of the whole study as known so
    far. KeyboardInterrupt after a signal, once all have saved their state. FailedError if a run fails.
    """
    waiting, free = list(runs), list(slots)
    running: dict[Path, tuple[subprocess.Popen[bytes], Slot]] = {}
    for workdir, config in runs.items():
        check(workdir, config)
    columns = "{n_fmt}/{total_fmt} runs |{bar}| {desc}"
    bar = tqdm(total=total, initial=done, bar_format=columns, disable=not sys.stderr.isatty())
    with bar, _stopping(running) as stop:
        while (waiting or running) and not (stop and not running):
            while waiting and free and not stop:
                workdir, slot = waiting.pop(0), free.pop(0)
                running[workdir] = start(workdir, runs[workdir], slot), slot
                if stop:  # the signal came while it was started
                    running[workdir][0].send_signal(signal.SIGTERM)
                bar.set_description_str(", ".join(path.name for path in running))
            time.sleep(POLL_S)
            for workdir in [path for path, (process, _) in running.items() if process.poll() is not None]:
                process, slot = running.pop(workdir)
                free.append(slot)
                if process.returncode in (0, DIVERGED):
                    outcome = "finished" if process.returncode == 0 else "diverged"
                    record_outcome(workdir, outcome)
                    done += 1
                    bar.update()
                    line = f"{done}/{total} {workdir.name}: {ended(workdir, outcome)}"
                    tqdm.write(line) if not bar.disable else print(line, flush=True)
                elif process.returncode == BAD_SETTING:
                    raise UserError(f"run {workdir.name}: {_last_line(workdir)}")
                elif not stop:
                    raise FailedError(f"run {workdir.name} failed ({_last_line(workdir)})")
    if stop:
        raise KeyboardInterrupt


def start(workdir: Path, config: Config, slot: Slot) -> "subprocess.Popen[bytes]":
    """The process of a run; its output is added to `workdir`.log."""
    workdir.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(workdir.with_name(f"{workdir.name}.json"), to_json(config).encode())
    command = [sys.executable, "-m", "relora_jax.studies.one_run", str(workdir), str(os.getpid())]
    with _log(workdir).open("ab") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches this process alone, which stops them all
            env={**os.environ, **dict(slot.environment)},
        )
    if slot.cores:
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, slot.cores)  # before it imports JAX, which counts them
    return process


def check(workdir: Path, config: Config) -> None:
    """UserError if the directory has a run with other settings.

    Its source may have been elsewhere: the directory of a study that has ended can be moved.
    """
    if not (workdir / record.CONFIG).is_file():
        return
    saved = record.read_config(workdir)
    if Path(saved.train.init_from).name == Path(config.train.init_from).name:
        saved.train.init_from = config.train.init_from
    if changed := changed_results(saved, config):
        raise UserError(
            f"{workdir} is of a study with other settings ({'; '.join(changed)}): use another --workdir"
        )


def outcome(workdir: Path) -> str:
    """How the run ended: "finished" or "diverged"; "" if it has not."""
    file = _outcome(workdir)
    return json.loads(file.read_text())["outcome"] if file.is_file() else ""


def record_outcome(workdir: Path, ended: str) -> None:
    """Writes how the run ended, once its files are complete."""
    atomic.write(_outcome(workdir), json.dumps({"outcome": ended}).encode())


def last_loss(workdir: Path) -> float:
    """The validation loss at the end of a run that has ended; infinite if it diverged."""
    losses = [row["loss"] for row in metrics_file.read(workdir) if row["kind"] == "eval"]
    if outcome(workdir) != "finished" or not losses or losses[-1] is None:
        return math.inf
    return losses[-1]


@contextlib.contextmanager
def _stopping(running: dict[Path, tuple["subprocess.Popen[bytes]", Slot]]) -> Iterator[list[Any]]:
    """A list that is filled at a signal, which all runs then receive; they are also stopped at an error."""
    stop: list[Any] = []

    def handle(number: int, _: Any) -> None:
        stop.append(number)
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for process, _ in running.values():
            process.send_signal(signal.SIGTERM)
        for process, _ in running.values():
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _last_line(workdir: Path) -> str:
    lines = _log(workdir).read_text(errors="replace").strip().splitlines()
    return (
        f"{lines[-1][:300].removeprefix('error: ')}; see {_log(workdir)}" if lines else f"see {_log(workdir)}"
    )


def _log(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.log")


def _outcome(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.outcome.json")
