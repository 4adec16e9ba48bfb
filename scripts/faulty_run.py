"""One run of the quickstart's model in processes of its own, for scripts/faults.py."""

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

import numpy as np
import orbax.checkpoint as ocp

from relora_jax.checkpoint.saved import checkpoints_dir, updates_saved
from relora_jax.run import metrics_file

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "quickstart.py"
UPDATES, W, CYCLE = 48, 12, 9  # restarts at 21, 30 and 39
SETTINGS = f"""
    data.sequence_length=32 train.batch=4 train.microbatch=2 train.updates={UPDATES}
    train.save_every_updates=5 train.evaluate_every_updates=16 train.eval_tokens=1024
    relora.warm_start_updates={W} relora.cycle_updates={CYCLE} relora.warm_up_updates=2
    relora.restart_warm_up_updates=2 relora.dropout=0.1 relora.product=separate optimizer.warm_up_updates=4
"""
# As `python -m relora_jax.train`, but the batches of some updates hold an id beyond the vocabulary, whose
# embedding is NaN.
WITH_NAN = """
import runpy
from relora_jax.data import batches as data
whole = data.train_batch
def train_batch(store, u, **shape):
    batch = whole(store, u, **shape)
    return batch._replace(ids=batch.ids.at[0, 0, 0].set(10**6)) if u in {6, 20, 21, 34} else batch
data.train_batch = train_batch
runpy.run_module("relora_jax.train", run_name="__main__")
"""
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
STOPPED, NO_DATA, REFUSED = 75, 74, 2
RUNNING: set[subprocess.Popen[str]] = set()


class UnexpectedError(Exception):
    """A process ended otherwise than documented."""


class Run:
    """A run in a folder with caches of its own, what its processes said, and its chances."""

    def __init__(self, folder: Path, rng: random.Random, *, cpu_s: float = 0.0, nan: bool = False) -> None:
        self.folder, self.rng, self.cpu_s, self.nan = folder, rng, cpu_s, nan
        self.workdir, self.rows = folder / "run", folder / "cache" / "relora_jax" / "rows"
        self.programs = folder.parent / "xla"  # compiled; shared, since their keys hold the path
        self.codes: list[int] = []
        self.errors: list[str] = []  # lines of standard error
        self.out = ""  # standard output of the process that ended last

    def start(self) -> subprocess.Popen[str]:
        """The same command, begun."""
        words = ["-c", WITH_NAN] if self.nan else ["-m", "relora_jax.train"]
        words += [f"--config={CONFIG}", *(f"--config.{word}" for word in SETTINGS.split())]
        environment = {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONPATH": str(ROOT)}
        environment |= {"TFDS_DATA_DIR": str(self.folder.parent / "tfds"), "PYTHONUNBUFFERED": "1"}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(self.programs)
        environment["OPENBLAS_NUM_THREADS"] = "1"  # the report's: threads that wait would burn half of a core
        process = subprocess.Popen(
            [sys.executable, *words, f"--workdir={self.workdir}"],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # not hit by the Ctrl-C that is meant for us
        )
        RUNNING.add(process)
        return process

    def end(self, process: subprocess.Popen[str], allowed: Callable[[int, str, str], bool]) -> None:
        """Until the process has ended. UnexpectedError where its exit code does not fit what it said."""
        self.out, err = process.communicate(timeout=1800)
        RUNNING.discard(process)
        self.codes.append(process.returncode)
        lines = [line for line in err.splitlines() if line.strip()]
        self.errors += lines[-1:] if any(line.startswith("Traceback") for line in lines) else lines
        if not allowed(process.returncode, self.out, err):
            raise UnexpectedError(f"exit code {process.returncode} is not documented for that")

    def stop(self, process: subprocess.Popen[str], *numbers: signal.Signals) -> None:
        """One of the signals, and the end with a code for it."""
        number, near_end = self.rng.choice(numbers or (KILL, TERM, INT)), self.done() > UPDATES - 6
        process.send_signal(number)
        self.end(process, functools.partial(documented, number, near_end=near_end))

    def done(self) -> int:
        """Updates of which metrics.jsonl has a row; the newest few may still be queued."""
        return max((row["update"] for row in metrics_file.read(self.workdir)), default=0)

    def wait(self, process: subprocess.Popen[str], *, times: float = 1.0) -> str:
        """Until a moment uniform in the (processor) time of a whole run, or the end; the moment in words."""
        moment_s = self.rng.uniform(0, times * self.cpu_s)
        while process.poll() is None and cpu_s(process) < moment_s:
            time.sleep(0.02)
        return f"{moment_s:.1f} s, update {self.done()}"

    def wait_saved(self, process: subprocess.Popen[str]) -> str:
        """Until the second checkpoint or a later one is there; its update, which is drawn, in words."""
        u = self.rng.randrange(10, UPDATES - 12)
        while process.poll() is None and max(updates_saved(self.workdir), default=0) < u:
            time.sleep(0.01)
        return f"checkpoint {max(updates_saved(self.workdir), default=0)}"

    def newest(self) -> Path:
        """The directory of the newest checkpoint; the run does not count as finished."""
        (self.workdir / "report.md").unlink(missing_ok=True)  # it was faster than we
        return checkpoints_dir(self.workdir) / str(updates_saved(self.workdir)[-1])


def documented(number: signal.Signals, code: int, out: str, err: str = "", *, near_end: bool) -> bool:
    """Whether a process that has printed `out` and `err` may end with the code after the signal.

    Right before the command has begun and after its last line, signals are Python's own: SIGTERM kills, and
    SIGINT is a KeyboardInterrupt, which an import may turn into another error or lose.
    """
    ended = near_end and ", report " in out
    if number == KILL:
        return code == -KILL or (code == 0 and ended)
    if number == INT and ((code == 1 and not out) or (code == 0 and "KeyboardInterrupt" in err)):
        return True
    return code == STOPPED or (code == 0 and ended) or (code in (-number, 130) and (ended or not out))


def cpu_s(process: subprocess.Popen[str]) -> float:
    """Processor time of a process of ours: its pace does not depend on what else the machine does."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def uninterrupted(directory: Path) -> None:
    """The runs to compare with, in `whole` and `whole_nan`: with caches, and the time of a warm one."""
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
    """(bytes of every array of the last checkpoint, rows without times) of a run that has ended."""
    assert (workdir / "report.md").is_file()
    with ocp.StandardCheckpointer() as reader:
        state = reader.restore(checkpoints_dir(workdir) / str(UPDATES) / "state")
    arrays = {path: np.asarray(value) for path, value in state.items()}
    times = ("tokens_per_s", "elapsed_s")
    rows = [{k: v for k, v in row.items() if k not in times} for row in metrics_file.read(workdir)]
    return {path: value.dtype.name.encode() + value.tobytes() for path, value in arrays.items()}, rows


def end_all() -> None:
    """Kills the processes that run."""
    for process in list(RUNNING):
        process.kill()
