"""The input pipeline alone: rows per second that arrive on the devices, first cold, then warm.

Cold: the shards were dropped from the operating system's page cache, if it allows that.
"""

import os
import time

import jax

from relora_jax.config import Config
from relora_jax.data import batches
from relora_jax.data.rows import RowStore
from relora_jax.training.sharding import make_mesh, row_sharding


def speeds(config: Config, store: RowStore, *, seconds: float) -> dict[str, float]:
    """{"cold" (or "first read") and "warm": rows per second}."""
    first = "cold" if drop_from_page_cache(store) else "first read"
    return {label: rows_per_s(config, store, seconds=seconds) for label in (first, "warm")}


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
