"""Writes the report of one run, or a comparison of several.

    python -m relora_jax.report --workdir RUN [RUN ...] [--output=comparison.md]
    python -m relora_jax.report --compare --workdir A B [--output=pair.md]

One RUN: its report.md with pictures; several: one page that compares them. Each page is also written as a
single HTML file with its pictures: report.html, comparison.html. These read only files: config.json,
run.json, metrics.jsonl and two checkpoints.

--compare: a page about two runs beyond perplexity: the loss along the line between their weights and along
random directions, the spectra of weights and updates, and how alike their activations are. It computes all
this on the devices, from the newest checkpoints and the held-out text.
"""

from collections.abc import Sequence

from relora_jax import cli
from relora_jax.reporting import comparison, page
from relora_jax.storage.location import any_path


def main(argv: Sequence[str]) -> int:
    """Writes the page and prints its path; returns the exit code."""
    parser = cli.ArgumentParser()
    parser.add_argument("--workdir", nargs="+", required=True)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--output")
    args = parser.parse_args(argv[1:])
    runs = comparison.find_workdirs(args.workdir)
    if args.compare:
        from relora_jax.reporting import pair  # here: JAX is slow to import

        print(pair.write(runs, any_path(args.output or "pair.md")))
        return 0
    output = any_path(args.output or "comparison.md")
    one = len(runs) == 1 and not args.output
    print(page.write(runs[0]) if one else comparison.write(runs, output))
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
