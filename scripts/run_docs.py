"""python scripts/run_docs.py --clone=DIR [--pages=README.md,docs/train.md] [--list]

Runs the commands of README.md and docs/*.md as they are written, page by page, in a fresh clone at DIR whose
virtual environment is the one that the README's first command makes. A command is a block marked `bash`; the
blocks of a page run in one shell, one that ran before is not repeated, and one below a comment
`<!-- not run: REASON -->` is left out. `data/` in the clone holds speeches of the extra quickstart, as text
of one's own. --list only lists the blocks. Exit code 1 if a block fails.
"""

import gzip
import itertools
import json
import re
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from relora_jax import cli
from relora_jax.data import sotu
from relora_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PAGES = (
    "index",
    "train",
    "text",
    "continue",
    "devices",
    "evaluate",
    "reliability",
    "performance",
    "results",
    "design",
)
BLOCK = re.compile(
    r"^(?: *<!-- not run: (?P<reason>.+?) -->\n)?(?P<indent> *)```bash\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
DONE = "@@@ "  # before the number of a block that ended well


class Block(NamedTuple):
    """Commands of a page: where they are, and why they are not run ("" if they are)."""

    page: str
    line: int
    code: str
    reason: str


def blocks(page: str, text: str) -> Iterator[Block]:
    """The `bash` blocks of a page, in order."""
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(page, line, textwrap.dedent(match["code"]), match["reason"] or "")


def run(clone: Path, todo: Sequence[Block]) -> Iterator[tuple[Block, float, int]]:
    """(block, seconds, exit code) of each, run in one shell; the last one's code is that of the shell."""
    lines = ["set -e", "if [ -d .venv ]; then . .venv/bin/activate; fi"]
    for number, block in enumerate(todo):
        lines += [block.code, f"echo; echo '{DONE}{number}'"]
    shell_command = ["bash", "-c", "exec 2>&1\n" + "\n".join(lines)]
    since, remaining = time.monotonic(), list(todo)
    with subprocess.Popen(shell_command, cwd=clone, stdout=subprocess.PIPE, text=True) as shell:
        for line in shell.stdout or ():
            if line.startswith(DONE):
                yield remaining.pop(0), time.monotonic() - since, 0
                since = time.monotonic()
            else:
                print(f"    {line.rstrip()}", flush=True)
    if shell.returncode:
        yield remaining[0], time.monotonic() - since, shell.returncode


def write_text(folder: Path) -> None:
    """The speeches as two .jsonl.gz files."""
    folder.mkdir()
    speeches = [file.read_text() for file in sotu.speeches()]
    for number in (0, 1):
        with gzip.open(folder / f"speeches-{number}.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in speeches[number::2])


def main(argv: Sequence[str]) -> int:
    """Runs what the command line names and prints a table; the exit code."""
    names = ["README.md", *(f"docs/{name}.md" for name in PAGES)]
    options = cli.options(argv, clone="", pages=",".join(names), list=False)
    pages = [list(blocks(name, (ROOT / name).read_text())) for name in options["pages"].split(",")]
    if options["list"]:
        for block in itertools.chain(*pages):
            print(f"{block.page}:{block.line}  {block.reason or 'run'}")
        return 0
    clone = Path(options["clone"]).resolve()
    if not options["clone"]:
        raise UserError("--clone is missing: name a directory for the clone, such as --clone=/tmp/docs")
    if not clone.exists():
        subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
        write_text(clone / "data")
    rows, seen, failed = [], set[str](), False
    for page in pages:
        todo = [block for block in page if not block.reason and block.code not in seen]
        rows += [(block, f"not run: {block.reason}") for block in page if block.reason]
        seen |= {block.code for block in todo}
        for block, seconds, code in run(clone, todo):
            rows.append((block, f"{seconds:.0f} s, exit code {code}"))
            print(f"{block.page}:{block.line}  {rows[-1][1]}", flush=True)
            failed |= code != 0
    print("\n".join(f"{block.page}:{block.line}  {result}" for block, result in rows))
    return int(failed)


if __name__ == "__main__":
    cli.main(main, __doc__)
