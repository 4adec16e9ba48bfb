"""One run of the model of 2m in child processes, for scripts/faults.py."""

import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from relora_jax.checkpoint.saved import Checkpoint, checkpoints_dir, updates_saved
from relora_jax.run import metrics_file

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "2m.py"
UPDATES, W, CYCLE = 48, 12, 9  # restarts at 21, 30 and 39
SETTINGS = f"""
    data.sequence_length=32 train.batch=4 train.microbatch=2 train.updates={UPDATES}
    train.save_every_updates=5 train.evaluate_every_updates=16 train.eval_tokens=1024
    relora.warm_start_updates={W} relora.cycle_updates={CYCLE} relora.warm_up_updates=2
    relora.restart_warm_up_updates=2 relora.dropout=0.1 relora.product=separate optimizer.warm_up_updates=4
"""
# Like `python -m relora_jax.train`, but the batches of some updates contain an id outside the vocabulary,
# whose embedding is NaN.
WITH_NAN = """
import runpy
from relora_jax.data import batches as data
original = data.train_batch
def train_batch(store, u, **shape):
    batch = original(store, u, **shape)
    return batch._replace(ids=batch.ids.at[0, 0, 0].set(10**6)) if u in {6, 20, 21, 34} else batch
data.train_batch = train_batch
runpy.run_module("relora_jax.train", run_name="__main__")
"""
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
STOPPED, NO_DATA, REFUSED = 75, 74, 2
RUNNING: set[subprocess.Popen[str]] = set()


class UnexpectedError(Exception):
    """A process ended with an undocumented exit code."""


class Run:
    """A run in its own folder with its own caches, the output of its processes, and a random generator."""

    def __init__(self, folder: Path, rng: random.Random, *, cpu_s: float = 0.0, nan: bool = False) -> None:
        self.folder, self.rng, self.cpu_s, self.nan = folder, rng, cpu_s, nan
        self.workdir, self.rows = folder / "run", folder / "cache" / "relora_jax" / "rows"
        self.programs = folder.parent / "xla"  # compiled; shared, since the path is part of their keys
        self.codes: list[int] = []
        self.errors: list[str] = []  # lines of standard error
        self.out = ""  # of the last process to end

    def start(self, *flags: str) -> subprocess.Popen[str]:
        """Starts the training command, with further flags."""
        args = ["-c", WITH_NAN] if self.nan else ["-m", "relora_jax.train"]
        args += [f"--config={CONFIG}", *(f"--config.{setting}" for setting in SETTINGS.split())]
        environment = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        environment |= {"TFDS_DATA_DIR": str(self.folder.parent / "tfds"), "PYTHONUNBUFFERED": "1"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self.programs)
        environment["OPENBLAS_NUM_THREADS"] = "1"  # the report's idle threads would use half a core
        process = subprocess.Popen(
            [sys.executable, *args, f"--workdir={self.workdir}", *flags],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only this script
        )
        RUNNING.add(process)
        return process

    def end(self, process: subprocess.Popen[str], allowed: Callable[[int, str, str], bool]) -> None:
        """Waits for the process to end. UnexpectedError unless its exit code and output are `allowed`."""
        self.out, err = process.communicate(timeout=1800)
        RUNNING.discard(process)
        self.codes.append(process.returncode)
        lines = [line for line in err.splitlines() if line.strip()]
        self.errors += lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines
        if not allowed(process.returncode, self.out, err):
            raise UnexpectedError(f"exit code {process.returncode} is not documented for this fault")

    def stop(self, process: subprocess.Popen[str], *numbers: signal.Signals) -> None:
        """Sends one of the signals and waits for an exit code that fits it."""
        number = self.rng.choice(numbers or (KILL, TERM, INT))
        near_end = self.last_update() > UPDATES - 6
        process.send_signal(number)
        self.end(process, functools.partial(is_documented, number, near_end=near_end))

    def last_update(self) -> int:
        """The last update in metrics.jsonl; the newest few may still be queued."""
        return max((row["update"] for row in metrics_file.read(self.workdir)), default=0)

    def wait(self, process: subprocess.Popen[str], *, times: float = 1.0) -> str:
        """Waits a random part of a whole run's processor time, or to the end; describes the moment."""
        moment_s = self.rng.uniform(0, times * self.cpu_s)
        while process.poll() is None and cpu_s(process) < moment_s:
            time.sleep(0.02)
        return f"{moment_s:.1f} s, update {self.last_update()}"

    def wait_saved(self, process: subprocess.Popen[str]) -> str:
        """Waits for the second checkpoint or a later, random one; describes the newest checkpoint."""
        u = self.rng.randrange(10, UPDATES - 12)
        while process.poll() is None and max(updates_saved(self.workdir), default=0) < u:
            time.sleep(0.01)
        return f"checkpoint {max(updates_saved(self.workdir), default=0)}"

    def newest(self) -> Path:
        """The directory of the newest checkpoint. Removes report.md, so that the run counts as unfinished."""
        (self.workdir / "report.md").unlink(missing_ok=True)  # if it finished before the signal
        return Path(checkpoints_dir(self.workdir)) / str(updates_saved(self.workdir)[-1])


def is_documented(number: signal.Signals, code: int, out: str, err: str = "", *, near_end: bool) -> bool:
    """Whether a process that printed `out` and `err` may exit with `code` after the signal `number`.

    Before the command starts and after its last line, Python's own handlers apply: SIGTERM kills, and SIGINT
    is a KeyboardInterrupt, which an import may turn into another error or swallow.
    """
    ended = near_end and ", report " in out
    if number == KILL:
        return code == -KILL or (code == 0 and ended)
    if number == INT and ((code == 1 and not out) or (code == 0 and "KeyboardInterrupt" in err)):
        return True
    return code == STOPPED or (code == 0 and ended) or (code in (-number, 130) and (ended or not out))


def cpu_s(process: subprocess.Popen[str]) -> float:
    """Processor time of a child process, which does not depend on the load of the machine."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def uninterrupted(directory: Path) -> None:
    """Makes the runs to compare with, `whole` and `whole_nan`: caches, and the time of a warm run."""
    for name in ("whole", "whole_nan"):
        if (directory / name / "cpu_s").exists():
            continue
        shutil.rmtree(directory / name, ignore_errors=True)
        if name == "whole_nan":
            shutil.copytree(directory / "whole" / "cache", directory / name / "cache")
        for _ in ("cold", "warm"):
            run = Run(directory / name, random.Random(0), nan=name == "whole_nan")
            shutil.rmtree(run.workdir, ignore_errors=True)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            run.end(run.start(), lambda code, *_: code == 0)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        (directory / name / "cpu_s").write_text(f"{seconds:.1f}\n")


def outcome(workdir: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """(bytes of every array of the last checkpoint, rows without times) of a finished run."""
    assert (workdir / "report.md").is_file()
    checkpoint = Checkpoint.open(checkpoints_dir(workdir) / str(UPDATES))
    device = SingleDeviceSharding(jax.devices()[0])  # it may be of several processes
    like = {
        path: jax.ShapeDtypeStruct(shape, dtype, sharding=device)
        for path, (shape, dtype) in checkpoint.specs.items()
    }
    arrays = {path: np.asarray(value) for path, value in checkpoint.read(like).items()}
    rows = [
        {k: v for k, v in row.items() if k not in metrics_file.TIMES} for row in metrics_file.read(workdir)
    ]
    return {path: value.dtype.name.encode() + value.tobytes() for path, value in arrays.items()}, rows


def end_all() -> None:
    """Kills the running processes."""
    for process in list(RUNNING):
        process.kill()
