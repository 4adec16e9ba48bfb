"""Measures the input pipeline alone: rows and tokens per second onto the devices, first cold, then warm.

    python -m relora_jax.throughput --config=configs/quickstart.py [--seconds=5]

Cold: the shards were dropped from the operating system's page cache, if it allows that. Tokens are targets,
sequence_length per row, as in a run's metrics.
"""

import os
import time
from collections.abc import Sequence

import jax

from relora_jax import cli
from relora_jax.config import Config
from relora_jax.data import batches, prepared
from relora_jax.data.rows import RowStore
from relora_jax.data.stores import PrepareOptions
from relora_jax.errors import UserError
from relora_jax.training.sharding import make_mesh, row_sharding, start_devices
from relora_jax.validate import validate


def rows_per_s(config: Config, store: RowStore, *, seconds: float) -> float:
    """Train rows per second that arrive on the devices, prefetched as in a run.

    Measured over one epoch from the first update on, or over `seconds` of it.
    """
    mesh = make_mesh(**vars(config.mesh), devices=jax.devices())
    sharding = row_sharding(mesh, accumulated=True)
    size = config.train.batch
    epoch = max(1, store.rows // size)
    start, rows = time.perf_counter(), 0
    for batch in batches.prefetch(batches.stream(config, store, sharding), 0, epoch):
        jax.block_until_ready(batch)
        rows += size
        if time.perf_counter() - start > seconds:
            break
    return rows / (time.perf_counter() - start)


def drop_from_page_cache(store: RowStore) -> bool:
    """Asks the operating system to drop the shards from its page cache; False if it has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for shard in store.manifest["shards"]:
        if shard["rows"]:
            with (store.path / shard["file"]).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def main(argv: Sequence[str]) -> int:
    """Prints both speeds; returns the exit code."""
    config, strings = cli.parse(argv, seconds="5")
    validate(config, devices=len(start_devices()))
    try:
        seconds = float(strings["seconds"])
    except ValueError:
        raise UserError(f"--seconds={strings['seconds']} is not a number") from None
    store = prepared.prepare(config.data, PrepareOptions(command=cli.command("prepare", argv))).train
    cold = "cold" if drop_from_page_cache(store) else "first read"
    for label in (cold, "warm"):
        speed = rows_per_s(config, store, seconds=seconds)
        print(f"{label}: {speed:,.0f} rows/s, {speed * store.sequence_length:,.0f} tokens/s")
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
