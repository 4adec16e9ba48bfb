"""python -m relora_jax.studies.one_run DIR: trains the run in DIR, whose config is DIR.json; as `train` does.

It stops, as at a signal, if the process that started it is gone.
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
from relora_jax.run.signals import Signals


def main(argv: Sequence[str]) -> int:
    """Trains to the end or to a signal; returns the exit code of `train`."""
    workdir = Path(argv[1])
    config = from_json(workdir.with_name(f"{workdir.name}.json").read_text())
    threading.Thread(target=_stop_without, args=(os.getppid(),), daemon=True).start()
    options = PrepareOptions(command="", progress=False, skip_bad_documents=False)
    with Signals() as signals:
        return loop.run(config, workdir, options, signals)


def _stop_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    cli.main(main, __doc__)
