"""The faults of scripts/faults.py: what befalls a run, its restart, and the comparison at its end."""

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
    """One fault, as it ended."""

    number: int
    kind: str
    moment: str = ""
    codes: str = ""
    said: str = ""
    went_on_after: str = ""
    equal: bool = False
    seconds: float = 0.0


def stopped(run: Run, *numbers: signal.Signals, times: float = 1.0) -> str:
    """A signal at a random moment."""
    process = run.start()
    moment = run.wait(process, times=times)
    run.stop(process, *numbers)
    return moment


def several(run: Run) -> str:
    """Two to four signals, each at a random moment of another start, rather early."""
    return "; ".join(stopped(run, times=0.6) for _ in range(run.rng.randint(2, 4)))


def cold(run: Run) -> str:
    """A signal while programs are compiled; perhaps some of those kept are cut, as by a full disk."""
    run.programs = run.folder / "xla"
    moment = stopped(run, times=2.5)
    kept = files(run.programs) if run.programs.exists() else []
    cuts = run.rng.sample(kept, min(len(kept), run.rng.choice((0, 3))))
    for file in cuts:
        cut(file, run.rng)
    return f"{moment}, {len(cuts)} programs cut"


def damaged(run: Run, damage: Callable[[Path, random.Random], object], whole_step: bool = False) -> str:
    """A stop, and the newest checkpoint damaged; an older one is there."""
    process = run.start()
    run.wait_saved(process)
    run.stop(process)
    step = run.newest()
    file = step if whole_step else run.rng.choice(files(step))
    damage(file, run.rng)
    return f"checkpoint {step.name}, {file.relative_to(step.parent)}"


def files(folder: Path) -> list[Path]:
    """The files below a folder that are not empty, in an order of their own."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def cut(file: Path, rng: random.Random) -> None:
    """Shorter than it was."""
    os.truncate(file, rng.randrange(file.stat().st_size))


def flip(file: Path, rng: random.Random) -> None:
    """One bit changed."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def clear(folder: Path, _: random.Random) -> None:
    """An empty folder in its place."""
    shutil.rmtree(folder)
    folder.mkdir()


def rows_away(run: Run) -> str:
    """The row store renamed at a random moment, and back after the end."""
    process = run.start()
    moment = run.wait(process)
    aside = run.rows.rename(run.rows.with_name("aside"))
    run.end(process, lambda code, *_: code in (0, NO_DATA))
    shutil.rmtree(run.rows, ignore_errors=True)  # made anew where it was away before it was opened
    aside.rename(run.rows)
    return moment


def rows_lost(run: Run) -> str:
    """A stop, and no row store at the next start, which makes it anew from the text."""
    moment = stopped(run)
    shutil.rmtree(run.rows)
    return moment


def disk_full(run: Run) -> str:
    """From a random moment on no file can become larger than some bytes."""
    process, limit_kib = run.start(), run.rng.choice((1, 16, 256, 4096))
    moment = run.wait_saved(process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1024 * limit_kib, 1024 * limit_kib))
    run.end(process, lambda code, *_: code == NO_DATA)
    return f"{moment}, {limit_kib} KiB"


def two(run: Run) -> str:
    """A second process on the same workdir, refused; the first is stopped a while later."""
    first = run.start()
    moment = run.wait_saved(first)
    second = run.start()
    run.end(second, lambda code, *_: code == REFUSED)
    run.stop(first)
    return moment


KINDS: dict[str, Callable[[Run], str]] = {
    "SIGKILL": lambda run: stopped(run, KILL),
    "SIGTERM": lambda run: stopped(run, TERM),
    "SIGINT": lambda run: stopped(run, INT),
    "several signals": several,
    "signal while compiling": cold,
    "checkpoint: file cut": lambda run: damaged(run, cut),
    "checkpoint: file emptied": lambda run: damaged(run, lambda file, _: os.truncate(file, 0)),
    "checkpoint: file removed": lambda run: damaged(run, lambda file, _: file.unlink()),
    "checkpoint: bit flipped": lambda run: damaged(run, flip),
    "checkpoint: emptied": lambda run: damaged(run, clear, whole_step=True),
    "rows away while it runs": rows_away,
    "rows lost before a start": rows_lost,
    "NaN batches, signal": stopped,
    "disk full": disk_full,
    "two processes": two,
}


def drawn(seed: int, number: int) -> tuple[str, random.Random]:
    """(kind, chances) of a fault: every len(KINDS) faults in a row hold each kind once."""
    block, place = divmod(number - 1, len(KINDS))
    kinds = random.Random(f"{seed} block {block}").sample(list(KINDS), len(KINDS))
    return kinds[place], random.Random(f"{seed} fault {number}")


def hit(directory: Path, seed: int, number: int) -> Result:
    """The fault, its run started again to the end, and compared; a run that is not equal stays there."""
    since, (kind, rng) = time.monotonic(), drawn(seed, number)
    nan, folder = kind.startswith("NaN"), directory / f"seed_{seed}_{number:03}"
    whole = directory / ("whole_nan" if nan else "whole")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole / "cache", folder / "cache")
    cpu_s = float((whole / "cpu_s").read_text())
    run, result = Run(folder, rng, cpu_s=cpu_s, nan=nan), Result(number, kind)
    try:
        result.moment = KINDS[kind](run)
        run.end(run.start(), lambda code, *_: code == 0)
        found = re.search(r"goes on after update (\d+)|(is finished)", run.out)
        result.went_on_after = (found[1] or "the end") if found else "nothing"
        result.equal = outcome(run.workdir) == outcome(whole / "run")
    except Exception as error:
        result.moment = f"{result.moment} {type(error).__name__}: {error}".strip()
    result.codes = " ".join(map(str, run.codes))
    said = "; ".join(run.errors).replace(f"{run.folder}/", "")
    result.said = re.sub(r"/\S*/site-packages/", "", said)
    result.seconds = round(time.monotonic() - since, 1)
    if result.equal:
        shutil.rmtree(folder)
    return result
