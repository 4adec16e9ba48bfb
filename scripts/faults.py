"""python scripts/faults.py --n=20 [--seed=0] [--directory=DIR] [--workers=1] [--table=FILE.md]

n runs of the quickstart's model in processes of their own: each is hit by one fault, drawn from (seed,
number), started again to its end, and must equal the uninterrupted run bit for bit: every array of the last
checkpoint, every row of metrics.jsonl but its times. Exit codes are checked too. One row per fault, then
`20/20 ended bitwise equal`; exit code 0 for that alone. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside it, also where this one is imported
import fault_kinds
import faulty_run

COLUMNS = ("number", "kind", "moment", "codes", "said", "went_on_after", "equal")
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def main(words: list[str]) -> int:
    """The exit code: 0 where all ended equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "relora_faults")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path)
    given = parser.parse_args(words)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` has it ignored, here and below
    directory: Path = given.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    results = directory / f"seed_{given.seed}.jsonl"
    done = read(results, given.n)
    for row in done.values():
        print(line(row), flush=True)
    missing = [number for number in range(1, given.n + 1) if number not in done]
    git = ["git", "-C", str(faulty_run.ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    if missing:
        faulty_run.uninterrupted(directory)
    with ThreadPoolExecutor(given.workers) as threads:
        futures = [threads.submit(fault_kinds.hit, directory, given.seed, number) for number in missing]
        try:
            for future in as_completed(futures):
                row: dict[str, Any] = dataclasses.asdict(future.result()) | {"commit": commit}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(line(row), flush=True)
                done[row["number"]] = row
        except KeyboardInterrupt:
            print("\nstopped: the same command goes on from here", file=sys.stderr)
            faulty_run.end_all()
            os._exit(130)  # the threads wait for processes that are gone
    equal = sum(row["equal"] for row in done.values())
    if given.table:
        command = f"python scripts/faults.py --n={given.n} --seed={given.seed}"
        given.table.write_text(table(command, [done[k] for k in sorted(done)]), encoding="utf-8")
    print(f"{equal}/{given.n} ended bitwise equal")
    return 0 if equal == given.n else 1


def read(results: Path, n: int) -> dict[int, dict[str, Any]]:
    """The rows of the faults 1 to n that have ended, by number; a torn last line is left out."""
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True) if results.exists() else []
    rows = [json.loads(text) for text in lines if text.endswith("\n")]
    return {row["number"]: row for row in sorted(rows, key=lambda row: row["number"]) if row["number"] <= n}


def line(row: dict[str, Any]) -> str:
    """One fault, as the terminal shows it."""
    verdict = "equal" if row["equal"] else "NOT EQUAL"
    return (
        f"{row['number']:3}  {row['kind']:26} {row['moment']:30} {row['codes']:14} "
        f"on after {row['went_on_after']:8} {verdict}  {row['said']}"
    )


def table(command: str, rows: list[dict[str, Any]]) -> str:
    """The faults as markdown, with what they were made by."""
    versions = ", ".join(f"{name} {version(name)}" for name in VERSIONS)
    commits = " and ".join(sorted({row["commit"] for row in rows}))
    equal, minutes = sum(row["equal"] for row in rows), sum(row["seconds"] for row in rows) / 60
    short = lambda text: text if len(text) < 240 else f"{text[:240]} ..."  # noqa: E731
    cells = [[short(str(row[key])).replace("|", "\\|") for key in COLUMNS] for row in rows]
    cells = [[*cell[:-1], "yes" if row["equal"] else "**no**"] for cell, row in zip(cells, rows, strict=True)]
    return "\n".join(
        [
            f"`{command}`: **{equal}/{len(rows)} ended bitwise equal**, {minutes:.0f} minutes of runs, on "
            f"{time.strftime('%Y-%m-%d')}, commit {commits}, Python {platform.python_version()}, {versions}, "
            f"{os.cpu_count()} cores.\n",
            f"| {' | '.join(key.replace('_', ' ') for key in COLUMNS)} |",
            "|---" * len(COLUMNS) + "|",
            *(f"| {' | '.join(cell)} |" for cell in cells),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
