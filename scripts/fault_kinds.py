"""The faults of scripts/faults.py: each hits a run, which is resumed and compared at its end."""

import dataclasses
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from faulty_run import INT, KILL, NO_DATA, REFUSED, TERM, Run, outcome


@dataclasses.dataclass
class Result:
    """The outcome of one fault, as stored in the results file."""

    number: int
    kind: str
    moment: str = ""
    codes: str = ""
    stderr: str = ""  # standard error
    resumed_after: str = ""  # the update that the run resumed from
    equal: bool = False
    seconds: float = 0.0


def stop_randomly(run: Run, *numbers: signal.Signals, times: float = 1.0) -> str:
    """Sends one of the signals at a random moment."""
    process = run.start()
    moment = run.wait(process, times=times)
    run.stop(process, *numbers)
    return moment


def stop_repeatedly(run: Run) -> str:
    """Stops two to four starts, each at a random, rather early moment."""
    return "; ".join(stop_randomly(run, times=0.6) for _ in range(run.rng.randint(2, 4)))


def stop_while_compiling(run: Run) -> str:
    """Stops while programs compile; may then truncate some cached programs, as a full disk would."""
    run.programs = run.folder / "xla"
    moment = stop_randomly(run, times=2.5)
    cached = files(run.programs) if run.programs.exists() else []
    cuts = run.rng.sample(cached, min(len(cached), run.rng.choice((0, 3))))
    for file in cuts:
        truncate(file, run.rng)
    return f"{moment}, {len(cuts)} programs cut"


def damage_checkpoint(
    run: Run, damage: Callable[[Path, random.Random], object], whole_step: bool = False
) -> str:
    """Stops the run and damages its newest checkpoint; an older one exists."""
    process = run.start()
    run.wait_saved(process)
    run.stop(process)
    step = run.newest()
    file = step if whole_step else run.rng.choice(files(step))
    damage(file, run.rng)
    return f"checkpoint {step.name}, {file.relative_to(step.parent)}"


def files(folder: Path) -> list[Path]:
    """The non-empty files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def truncate(file: Path, rng: random.Random) -> None:
    """Truncates the file at a random byte."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip_bit(file: Path, rng: random.Random) -> None:
    """Flips a random bit."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def empty(folder: Path, _: random.Random) -> None:
    """Removes everything in the folder."""
    shutil.rmtree(folder)
    folder.mkdir()


def rename_rows(run: Run) -> str:
    """Renames the row store at a random moment, and back when the process has ended."""
    process = run.start()
    moment = run.wait(process)
    aside = run.rows.rename(run.rows.with_name("aside"))
    run.end(process, lambda code, *_: code in (0, NO_DATA))
    shutil.rmtree(run.rows, ignore_errors=True)  # built again if it was renamed before it was opened
    aside.rename(run.rows)
    return moment


def remove_rows(run: Run) -> str:
    """Stops the run and removes the row store, which the next start builds again from the text."""
    moment = stop_randomly(run)
    shutil.rmtree(run.rows)
    return moment


def fill_disk(run: Run) -> str:
    """Limits the size of files from a random moment on."""
    process, limit_kib = run.start(), run.rng.choice((1, 16, 256, 4096))
    moment = run.wait_saved(process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024 * limit_kib, 1024 * limit_kib))
    run.end(process, lambda code, *_: code == NO_DATA)
    return f"{moment}, {limit_kib} KiB"


def start_twice(run: Run) -> str:
    """Starts a second process on the same workdir, which is refused, then stops the first."""
    first = run.start()
    moment = run.wait_saved(first)
    second = run.start()
    run.end(second, lambda code, *_: code == REFUSED)
    run.stop(first)
    return moment


KINDS: dict[str, Callable[[Run], str]] = {
    "SIGKILL": lambda run: stop_randomly(run, KILL),
    "SIGTERM": lambda run: stop_randomly(run, TERM),
    "SIGINT": lambda run: stop_randomly(run, INT),
    "several signals": stop_repeatedly,
    "signal while compiling": stop_while_compiling,
    "checkpoint: file cut": lambda run: damage_checkpoint(run, truncate),
    "checkpoint: file emptied": lambda run: damage_checkpoint(run, lambda file, _: os.truncate(file, 0)),
    "checkpoint: file removed": lambda run: damage_checkpoint(run, lambda file, _: file.unlink()),
    "checkpoint: bit flipped": lambda run: damage_checkpoint(run, flip_bit),
    "checkpoint: emptied": lambda run: damage_checkpoint(run, empty, whole_step=True),
    "rows away while it runs": rename_rows,
    "rows lost before a start": remove_rows,
    "NaN batches, signal": stop_randomly,
    "disk full": fill_disk,
    "two processes": start_twice,
}


def draw(seed: int, number: int) -> tuple[str, random.Random]:
    """(kind, random generator) of a fault: each block of len(KINDS) faults has every kind once."""
    block, index = divmod(number - 1, len(KINDS))
    kinds = random.Random(f"{seed} block {block}").sample(list(KINDS), len(KINDS))
    return kinds[index], random.Random(f"{seed} fault {number}")


def run_fault(directory: Path, seed: int, number: int) -> Result:
    """Runs the fault, resumes the run to its end and compares it; a run that is not equal is kept on disk."""
    since, (kind, rng) = time.monotonic(), draw(seed, number)
    nan, folder = kind.startswith("NaN"), directory / f"seed_{seed}_{number:03}"
    whole = directory / ("whole_nan" if nan else "whole")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / "cache", folder / "cache")
    cpu_s = float((whole / "cpu_s").read_text())
    run, result = Run(folder, rng, cpu_s=cpu_s, nan=nan), Result(number, kind)
    try:
        result.moment = KINDS[kind](run)
        run.end(run.start(), lambda code, *_: code == 0)
        match = re.search(r"resumed after update (\d+)|(is finished)", run.out)
        result.resumed_after = (match[1] or "the end") if match else "nothing"
        result.equal = outcome(run.workdir) == outcome(whole / "run")
    except Exception as error:
        result.moment = f"{result.moment} {type(error).__name__}: {error}".strip()
    result.codes = " ".join(map(str, run.codes))
    errors = "; ".join(run.errors).replace(f"{run.folder}/", "")
    result.stderr = re.sub(r"/\S*/site-packages/", "", errors)
    result.seconds = round(time.monotonic() - since, 1)
    if result.equal:
        shutil.rmtree(folder)
    return result
