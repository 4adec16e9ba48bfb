"""python -m relora_jax.studies.one_run DIR PARENT: trains the run in DIR, whose config is DIR.json.

As `train` does, but it stops, as at a signal, if the process PARENT that started it is gone, and waits for a
process of an earlier parent that is still stopping.
"""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli, loop
from relora_jax.config import from_json
from relora_jax.data.stores import PrepareOptions
from relora_jax.run.directory import InUseError
from relora_jax.run.signals import GRACE_S, Signals

LONGEST_STOP_S = GRACE_S + 10


def main(argv: Sequence[str]) -> int:
    """Trains to the end or to a signal; returns the exit code of `train`."""
    workdir = Path(argv[1])
    config = from_json(workdir.with_name(f"{workdir.name}.json").read_text())
    threading.Thread(target=_stop_without, args=(int(argv[2]),), daemon=True).start()
    prepare = "python -m relora_jax.prepare, with a config of the study's settings under data"
    options = PrepareOptions(command=prepare, progress=False, skip_bad_documents=False)
    waited_s = 0
    while True:
        try:
            with Signals() as signals:
                return loop.run(config, workdir, options, signals)
        except InUseError:
            if waited_s > LONGEST_STOP_S:
                raise
        time.sleep(1)
        waited_s += 1


def _stop_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    cli.main(main, __doc__)
