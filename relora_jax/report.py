"""python -m relora_jax.report --workdir RUN [RUN ...] [--output=comparison.md]

A run's directory -> its report.md with pictures; several's -> one page that compares them. Each
page is also written as one file that holds its pictures: report.html, comparison.html.
Reads files only: config.json, run.json, metrics.jsonl and two checkpoints.
"""

from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.reporting import comparison, page


def main(argv: Sequence[str]) -> int:
    """Writes the page of one run or of several, and prints its path; the exit code."""
    parser = cli.Words()
    parser.add_argument("--workdir", nargs="+", required=True)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args(argv[1:])
    runs = comparison.places(given.workdir)
    one = len(runs) == 1 and not given.output
    print(page.write(runs[0]) if one else comparison.write(runs, given.output or Path("comparison.md")))
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
