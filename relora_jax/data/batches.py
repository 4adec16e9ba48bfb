"""Batches of rows as a pure function of (seed, update).

Dimensions: a accumulation steps, m microbatch, S = L + 1 ids per row, L = sequence_length.
A row is S ids and their true length; inputs are ids[:-1], targets ids[1:]. Target t counts if
t < length - 1 and, without attention across documents, ids t and t + 1 are in the same document.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int32

from relora_jax.config import Config
from relora_jax.data.rows import RowStore

SHUFFLE_ROUNDS = 4


class Batch(NamedTuple):
    """Rows on devices: ids [a, m, S] and lengths [a, m] for an update, [m, S] and [m] for evaluation.

    `segment_ids`: index of each id's document in its row; None if attention crosses documents.
    """

    ids: Int32[jax.Array, "*batch S"]
    lengths: Int32[jax.Array, "*batch"]
    segment_ids: Int32[jax.Array, "*batch S"] | None = None


def row_index(i: int, *, rows: int, seed: int) -> int:
    """The store index of row i of an infinite stream, in which each epoch is its own permutation."""
    from grain.experimental import index_shuffle  # takes a third of a second: while the first steps compile

    epoch, k = divmod(i, rows)
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    epoch_seed = int.from_bytes(mixed[:4], "little")  # index_shuffle takes a 32-bit seed
    return index_shuffle(k, max_index=rows - 1, seed=epoch_seed, rounds=SHUFFLE_ROUNDS)


def number_documents(ids: Int32[np.ndarray, "*batch S"], eos: int) -> Int32[np.ndarray, "*batch S"]:
    """The number of EOS before each id in its row; an EOS belongs to the document that it ends."""
    ends = (ids == eos).astype(np.int32)
    return ends.cumsum(axis=-1, dtype=np.int32) - ends


def train_batch(
    store: RowStore,
    update: int,
    *,
    batch: int,
    microbatch: int,
    seed: int,
    sharding: NamedSharding,
    across_documents: bool,
) -> Batch:
    """The batch of update u: its row j = a * microbatch + m is row u * batch + j of the stream.

    `sharding` applies to ids, lengths and segment_ids alike. Each process reads only the rows of its own
    devices. `segment_ids` are set unless attention goes `across_documents`.
    """
    stream = update * batch + np.arange(batch).reshape(-1, microbatch)
    index_of = lambda i: row_index(i, rows=store.rows, seed=seed)  # noqa: E731
    return _load(store, stream, index_of, sharding, across_documents)


def stream(config: Config, store: RowStore, sharding: NamedSharding) -> Callable[[int], Batch]:
    """The function update -> `train_batch` for a config."""
    return lambda update: train_batch(
        store,
        update,
        batch=config.train.batch,
        microbatch=config.train.microbatch,
        seed=config.train.seed,
        sharding=sharding,
        across_documents=config.data.attend_across_documents,
    )


def validation_rows(store: RowStore, *, eval_tokens: int) -> int:
    """Number of validation rows: eval_tokens // L, at least 1, at most all."""
    return min(store.rows, max(1, eval_tokens // store.sequence_length))


def validation_batches(
    store: RowStore, *, eval_tokens: int, microbatch: int, sharding: NamedSharding, across_documents: bool
) -> Iterator[Batch]:
    """Lazily read batches of the first `validation_rows` rows, in the store's order.

    The last batch is padded with rows of length 0, whose targets do not count.
    """
    rows = validation_rows(store, eval_tokens=eval_tokens)
    stream = np.full(math.ceil(rows / microbatch) * microbatch, -1)
    stream[:rows] = np.arange(rows)
    batches = stream.reshape(-1, microbatch)
    return (_load(store, batch, lambda i: i, sharding, across_documents) for batch in batches)


def _load(
    store: RowStore,
    stream: np.ndarray,
    index_of: Callable[[int], int],
    sharding: NamedSharding,
    across_documents: bool,
) -> Batch:
    """Rows index_of(i) for each i of `stream` [*batch] on this process's devices; -1 is a padding row."""
    shape = (*stream.shape, store.sequence_length + 1)
    mine = np.zeros(stream.shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        mine[(index or ())[: stream.ndim]] = True
    mine &= stream >= 0
    ids, lengths = np.zeros(shape, np.int32), np.zeros(stream.shape, np.int32)
    ids[mine], lengths[mine] = store.read([index_of(int(i)) for i in stream[mine]])
    parts = [ids, lengths] if across_documents else [ids, lengths, number_documents(ids, store.eos)]
    return Batch(*(jax.make_array_from_callback(part.shape, sharding, part.__getitem__) for part in parts))


def prefetch(
    load: Callable[[int], Batch], start: int, stop: int, depth: int = 2
) -> Generator[Batch, None, None]:
    """load(start), ..., load(stop - 1) in order, up to `depth` of them ahead, on a thread.

    An error in `load` is raised in place of its batch; closing the generator ends the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        ahead = deque(thread.submit(load, u) for u in range(start, min(start + depth, stop)))
        try:
            for u in range(start + depth, stop + depth):
                batch = ahead.popleft()
                if u < stop:
                    ahead.append(thread.submit(load, u))
                yield batch.result()
        finally:
            thread.shutdown(cancel_futures=True)
