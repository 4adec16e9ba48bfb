"""python -m relora_jax.train --config=configs/FILE.py[:ARM] [--config.GROUP.FIELD=VALUE ...] [--workdir=DIR]

Trains, evaluates, saves and reports. The same command again resumes; a finished run says so.
ARM: full, control, lora, lora_warm or relora (default). Exit codes: 0 finished, 2 wrong setting (starting
again will not help), 70 diverged, 74 data or disk failed, 75 stopped by a signal (start me again).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli, loop
from relora_jax.data.stores import How
from relora_jax.run.signals import Signals


def main(argv: Sequence[str]) -> int:
    """Runs the command line; the exit code."""
    config, strings = cli.parse(argv, workdir="")
    workdir = Path(strings["workdir"] or f"runs/{config.name}-{config.arm}").expanduser()
    how = How(command=cli.command("prepare", argv), progress=sys.stderr.isatty())
    with Signals() as signals:
        return loop.run(config, workdir, how, signals)


if __name__ == "__main__":
    cli.main(main, __doc__)
