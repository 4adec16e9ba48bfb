"""Rows of text, addressed by (seed, update): a batch is a pure function of them.

Legend: S ids of a row = L + 1, L its targets (sequence_length); a accumulation, m microbatch.
A row is S ids and their true length; inputs ids[:-1], targets ids[1:], target t counts where
t < length - 1 and, where documents are apart, ids t and t + 1 are of one document.
"""

import hashlib
import math
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding
from jaxtyping import Int32

from relora_jax.config import Config
from relora_jax.data.rows import RowStore

SHUFFLE_ROUNDS = 4


class Batch(NamedTuple):
    """Rows on devices: of an update ids [a, m, S], lengths [a, m]; of an evaluation [m, S] and [m].

    `segment_ids`: the number of each id's document in its row, where documents do not see each other.
    """

    ids: Int32[jax.Array, "*batch S"]
    lengths: Int32[jax.Array, "*batch"]
    segment_ids: Int32[jax.Array, "*batch S"] | None = None


def row_index(i: int, *, rows: int, seed: int) -> int:
    """The place in the store of row i of an endless stream: each epoch is a permutation of its own."""
    epoch, k = divmod(i, rows)
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    epoch_seed = int.from_bytes(mixed[:4], "little")  # index_shuffle takes 32 bits
    return index_shuffle(k, max_index=rows - 1, seed=epoch_seed, rounds=SHUFFLE_ROUNDS)


def number_documents(ids: Int32[np.ndarray, "*batch S"], eos: int) -> Int32[np.ndarray, "*batch S"]:
    """The number of EOS before each id of its row: one ends the document that it belongs to."""
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
    """Row j = a * microbatch + m of update u is row u * batch + j of the stream: pure in (seed, u).

    `sharding` lays out the microbatch axis of all parts alike. Each process reads the rows of its own
    devices alone. Documents are numbered where they are not to be attended `across_documents`.
    """
    stream = update * batch + np.arange(batch).reshape(-1, microbatch)
    place = lambda i: row_index(i, rows=store.rows, seed=seed)  # noqa: E731
    return _load(store, stream, place, sharding, across_documents)


def stream(config: Config, store: RowStore, sharding: NamedSharding) -> Callable[[int], Batch]:
    """`train_batch` of a config: update -> its batch."""
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
    """eval_tokens // L, one at least, all at most."""
    return min(store.rows, max(1, eval_tokens // store.sequence_length))


def validation_batches(
    store: RowStore, *, eval_tokens: int, microbatch: int, sharding: NamedSharding, across_documents: bool
) -> Iterator[Batch]:
    """The first `validation_rows` in the store's order, read as they are asked for.

    The last batch is filled up with rows of length 0, none of whose targets count.
    """
    rows = validation_rows(store, eval_tokens=eval_tokens)
    stream = np.full(math.ceil(rows / microbatch) * microbatch, -1)
    stream[:rows] = np.arange(rows)
    batches = stream.reshape(-1, microbatch)
    return (_load(store, each, lambda i: i, sharding, across_documents) for each in batches)


def _load(
    store: RowStore,
    stream: np.ndarray,
    place: Callable[[int], int],
    sharding: NamedSharding,
    across_documents: bool,
) -> Batch:
    """Rows place(i) for each i of `stream` [*batch] that a device of this process holds; -1 is no row."""
    shape = (*stream.shape, store.sequence_length + 1)
    mine = np.zeros(stream.shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        mine[(index or ())[: stream.ndim]] = True
    mine &= stream >= 0
    ids, lengths = np.zeros(shape, np.int32), np.zeros(stream.shape, np.int32)
    ids[mine], lengths[mine] = store.read([place(int(i)) for i in stream[mine]])
    parts = [ids, lengths] if across_documents else [ids, lengths, number_documents(ids, store.eos)]
    return Batch(*(jax.make_array_from_callback(part.shape, sharding, part.__getitem__) for part in parts))


def prefetch(
    make: Callable[[int], Batch], start: int, stop: int, depth: int = 2
) -> Generator[Batch, None, None]:
    """make(start), ..., make(stop - 1) in order, up to `depth` of them made ahead on a thread.

    An error of `make` is raised where its batch would have come; closing the iterator ends the thread.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
        ahead = deque(thread.submit(make, u) for u in range(start, min(start + depth, stop)))
        try:
            for u in range(start + depth, stop + depth):
                batch = ahead.popleft()
                if u < stop:
                    ahead.append(thread.submit(make, u))
                yield batch.result()
        finally:
            thread.shutdown(cancel_futures=True)
