"""The input side alone: rows and tokens a second to batches on the devices, read once cold and once warm.

    python -m relora_jax.throughput --config=configs/quickstart.py [--seconds=5]

Cold: the shards have left the operating system's cache, where it can be asked to drop them. Tokens are
targets, sequence_length a row, as in a run's metrics.
"""

import os
import time

import jax

from relora_jax import cli
from relora_jax.config import Config
from relora_jax.data import batches, prepared
from relora_jax.data.rows import RowStore
from relora_jax.data.stores import How
from relora_jax.errors import UserError
from relora_jax.training.sharding import make_mesh, row_sharding, start_devices
from relora_jax.validate import validate


def rows_per_s(config: Config, store: RowStore, *, seconds: float) -> float:
    """Rows of train batches that are ready on the devices in a second, prefetched as in a run.

    An epoch, or as much of it as `seconds` allow, from the first update on.
    """
    mesh = make_mesh(**vars(config.mesh), devices=jax.devices())
    layout = row_sharding(mesh, accumulated=True)
    batch = config.train.batch
    epoch = max(1, store.rows // batch)
    began, done = time.perf_counter(), 0
    for ready in batches.prefetch(batches.stream(config, store, layout), 0, epoch):
        jax.block_until_ready(ready)
        done += batch
        if time.perf_counter() - began > seconds:
            break
    return done / (time.perf_counter() - began)


def forget(store: RowStore) -> bool:
    """The operating system is asked to drop the shards from its cache; whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for shard in store.manifest["shards"]:
        if shard["rows"]:
            with (store.path / shard["file"]).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def main(argv: list[str]) -> int:
    """Prints both speeds; the exit code."""
    config, strings = cli.parse(argv, seconds="5")
    validate(config, devices=len(start_devices()))
    try:
        seconds = float(strings["seconds"])
    except ValueError:
        raise UserError(f"--seconds={strings['seconds']} is no number of seconds") from None
    store = prepared.prepare(config.data, How(command=cli.command("prepare", argv))).train
    cold = "cold" if forget(store) else "first reading"
    for what in (cold, "warm"):
        speed = rows_per_s(config, store, seconds=seconds)
        print(f"{what}: {speed:,.0f} rows/s, {speed * store.sequence_length:,.0f} tokens/s")
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
