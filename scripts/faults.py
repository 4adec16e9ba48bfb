"""python scripts/faults.py --n=20 [--seed=0] [--directory=DIR] [--workers=1] [--table=FILE.md]

Runs the model of 2m n times in separate processes. Each run is hit by one fault, drawn from (seed,
number), is resumed to its end, and must equal the uninterrupted run bit for bit: every array of the last
checkpoint and every row of metrics.jsonl except its times. Exit codes are checked too. Prints one row per
fault, then `20/20 ended bitwise equal`; exits with 0 only if all are equal. An interrupted command resumes.
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

sys.path.insert(0, str(Path(__file__).parent))  # for the modules next to this one, also when it is imported
import fault_kinds
import faulty_run

COLUMNS = ("number", "kind", "moment", "codes", "stderr", "resumed_after", "equal")
VERSIONS = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def main(argv: list[str]) -> int:
    """Runs the faults that have no result yet; returns 0 if all ended equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()) / "relora_faults")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for `... &`
    directory: Path = args.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    results = directory / f"seed_{args.seed}.jsonl"
    rows = read(results, args.n)
    for row in rows.values():
        print(line(row), flush=True)
    missing = [number for number in range(1, args.n + 1) if number not in rows]
    git = ["git", "-C", str(faulty_run.ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    if missing:
        faulty_run.uninterrupted(directory)
    with ThreadPoolExecutor(args.workers) as threads:
        futures = [threads.submit(fault_kinds.run_fault, directory, args.seed, number) for number in missing]
        try:
            for future in as_completed(futures):
                row: dict[str, Any] = dataclasses.asdict(future.result()) | {"commit": commit}
                with results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(line(row), flush=True)
                rows[row["number"]] = row
        except KeyboardInterrupt:
            print("\nstopped: run the same command to resume", file=sys.stderr)
            faulty_run.end_all()
            os._exit(130)  # the threads wait for processes that have been killed
    equal = sum(row["equal"] for row in rows.values())
    if args.table:
        command = f"python scripts/faults.py --n={args.n} --seed={args.seed}"
        args.table.write_text(table(command, [rows[k] for k in sorted(rows)]), encoding="utf-8")
    print(f"{equal}/{args.n} ended bitwise equal")
    return 0 if equal == args.n else 1


def read(results: Path, n: int) -> dict[int, dict[str, Any]]:
    """The results of the faults 1 to n that have ended, by number; a torn last line is skipped."""
    lines = results.read_text(encoding="utf-8").splitlines(keepends=True) if results.exists() else []
    rows = [json.loads(text) for text in lines if text.endswith("\n")]
    return {row["number"]: row for row in sorted(rows, key=lambda row: row["number"]) if row["number"] <= n}


def line(row: dict[str, Any]) -> str:
    """The terminal's line for one fault."""
    verdict = "equal" if row["equal"] else "NOT EQUAL"
    return (
        f"{row['number']:3}  {row['kind']:26} {row['moment']:30} {row['codes']:14} "
        f"resumed after {row['resumed_after']:8} {verdict}  {row['stderr']}"
    )


def table(command: str, rows: list[dict[str, Any]]) -> str:
    """The results as a Markdown table, with the command, commits and versions."""
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
