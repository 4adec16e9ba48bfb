"""Trains, evaluates, saves and reports a run; the same command resumes it.

    python -m relora_jax.train --config=configs/FILE.py[:ARM] [--config.GROUP.FIELD=VALUE ...] [--workdir=DIR]

ARM: full, control, lora, lora_warm or relora (default). DIR: local or gs://bucket/run, default
runs/NAME-ARM.
--text=PATTERN, --text_field=NAME and --validation_text=PATTERN are short for --config.data.text=... etc.
--skip_bad_documents: if rows of small text are prepared here, as in `prepare`.

Several processes find each other on a TPU pod, under Slurm, Open MPI or in a Kubernetes job. Elsewhere, start
each with --coordinator=HOST:PORT --processes=N --process=I, where HOST is that of process 0. If one dies, the
others stop --heartbeat=100 seconds later. --processes=1: this is the only one, whatever JAX detects.

Exit codes: 0 finished, 2 wrong setting (starting again does not help), 70 diverged, 74 data or disk failed,
75 stopped by a signal (run the same command again).
"""

import sys
from collections.abc import Sequence

from relora_jax import cli, loop
from relora_jax.data.stores import PrepareOptions
from relora_jax.run.signals import Signals
from relora_jax.storage.location import any_path
from relora_jax.training import processes


def main(argv: Sequence[str]) -> int:
    """Trains the run of the command line; returns the exit code."""
    config, values = cli.parse(argv, workdir="", skip_bad_documents=False, **processes.FLAGS)
    workdir = any_path(values["workdir"] or f"runs/{config.name}-{config.arm}")
    skip = values["skip_bad_documents"]
    options = PrepareOptions(
        command=cli.command("prepare", argv) + " --skip_bad_documents" * skip,
        progress=sys.stderr.isatty(),
        skip_bad_documents=skip,
    )
    with processes.joined(values) as request_stop, Signals(request_stop) as signals:
        return loop.run(config, workdir, options, signals)


if __name__ == "__main__":
    cli.main(main, __doc__, leave=processes.leave)
