"""Rows of text, addressed by (seed, update): a batch is a pure function of them.

Legend: S ids of a row = L + 1, L its targets (sequence_length); a accumulation, m microbatch.
A row is S ids and their true length; inputs ids[:-1], targets ids[1:], target t counts where
t < length - 1.
"""

import dataclasses
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from grain.experimental import index_shuffle
from jax.sharding import NamedSharding
from jaxtyping import Int32, Int64

FORMAT = 1  # of a row store: raise it with any change of the records, the packing or the manifest
MANIFEST, COUNTS = "manifest.json", "counts.npy"
SHUFFLE_ROUNDS = 4


class Batch(NamedTuple):
    """Rows on devices: of an update ids [a, m, S], lengths [a, m]; of an evaluation [m, S] and [m]."""

    ids: Int32[jax.Array, "*batch S"]
    lengths: Int32[jax.Array, "*batch"]


def record_type(*, sequence_length: int, pieces: int) -> np.dtype:
    """One record: true length (uint32), then S ids (uint16 where they fit, else uint32); little-endian."""
    ids = "<u2" if pieces <= 2**16 else "<u4"
    return np.dtype([("length", "<u4"), ("ids", ids, (sequence_length + 1,))])


@dataclasses.dataclass(frozen=True, eq=False)
class RowStore:
    """The rows that `prepare` wrote: `rows` of them, `tokens` ids in all, `counts` of each piece."""

    path: Path
    rows: int
    sequence_length: int
    tokens: int
    pieces: int
    manifest: dict[str, Any]
    counts: Int64[np.ndarray, " pieces"]
    _source: ArrayRecordDataSource

    @classmethod
    def open(cls, path: Path) -> "RowStore":
        """The store in a directory; ValueError where it is not whole."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
            counts = np.load(path / COUNTS)
            shards = [str(path / shard["file"]) for shard in manifest["shards"] if shard["rows"]]
            source = ArrayRecordDataSource(shards)
            if not len(source) == manifest["rows"] == sum(shard["rows"] for shard in manifest["shards"]):
                raise ValueError(f"{len(source)} rows of {manifest['rows']} are there")
            facts = {name: manifest[name] for name in ("rows", "sequence_length", "tokens", "pieces")}
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"{path} is no whole row store ({error}): delete it, and it is made again"
            ) from error
        return cls(path=path, manifest=manifest, counts=counts, _source=source, **facts)

    def read(self, indices: Sequence[int]) -> tuple[Int32[np.ndarray, "n S"], Int32[np.ndarray, " n"]]:
        """ids and true lengths of the rows at `indices`, in that order, by one call. OSError: unreadable."""
        record = record_type(sequence_length=self.sequence_length, pieces=self.pieces)
        try:
            records = self._source.__getitems__(indices) if len(indices) else []
        except RuntimeError as error:  # as ArrayRecord says that a file is gone or altered
            raise OSError(f"rows of {self.path} cannot be read ({' '.join(str(error).split())})") from error
        if any(len(each) != record.itemsize for each in records):
            raise ValueError(f"{self.path} holds a record of another size: delete it, and it is made again")
        table = np.frombuffer(b"".join(records), record)
        return table["ids"].astype(np.int32), table["length"].astype(np.int32)


def row_index(i: int, *, rows: int, seed: int) -> int:
    """The place in the store of row i of an endless stream: each epoch is a permutation of its own."""
    epoch, k = divmod(i, rows)
    mixed = hashlib.sha256(f"{seed} {epoch}".encode()).digest()
    epoch_seed = int.from_bytes(mixed[:4], "little")  # index_shuffle takes 32 bits
    return index_shuffle(k, max_index=rows - 1, seed=epoch_seed, rounds=SHUFFLE_ROUNDS)


def train_batch(
    store: RowStore, update: int, *, batch: int, microbatch: int, seed: int, sharding: NamedSharding
) -> Batch:
    """Row j = a * microbatch + m of update u is row u * batch + j of the stream: pure in (seed, u).

    `sharding` lays out the microbatch axis of ids and of lengths alike. Each process reads the rows of
    its own devices alone.
    """
    stream = update * batch + np.arange(batch).reshape(-1, microbatch)
    return _load(store, stream, lambda i: row_index(i, rows=store.rows, seed=seed), sharding)


def validation_batches(
    store: RowStore, *, eval_tokens: int, microbatch: int, sharding: NamedSharding
) -> list[Batch]:
    """The first eval_tokens // L rows (one at least, all at most) in the store's order.

    The last batch is filled up with rows of length 0, none of whose targets count.
    """
    rows = min(store.rows, max(1, eval_tokens // store.sequence_length))
    stream = np.full(math.ceil(rows / microbatch) * microbatch, -1)
    stream[:rows] = np.arange(rows)
    return [_load(store, each, lambda i: i, sharding) for each in stream.reshape(-1, microbatch)]


def _load(store: RowStore, stream: np.ndarray, place: Callable[[int], int], sharding: NamedSharding) -> Batch:
    """Rows place(i) for each i of `stream` [*batch] that a device of this process holds; -1 is no row."""
    shape = (*stream.shape, store.sequence_length + 1)
    mine = np.zeros(stream.shape, bool)
    for index in sharding.addressable_devices_indices_map(shape).values():
        mine[(index or ())[: stream.ndim]] = True
    mine &= stream >= 0
    ids, lengths = np.zeros(shape, np.int32), np.zeros(stream.shape, np.int32)
    ids[mine], lengths[mine] = store.read([place(int(i)) for i in stream[mine]])
    return Batch(
        jax.make_array_from_callback(ids.shape, sharding, lambda index: ids[index]),
        jax.make_array_from_callback(lengths.shape, sharding, lambda index: lengths[index]),
    )


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


def unigram_perplexity(counts: Int64[np.ndarray, " pieces"], batches: Iterable[Batch]) -> float:
    """exp(mean of -log((c + 1) / sum(c + 1)) over the targets that count), c the `counts` of each piece.

    What a model reaches that knows how often each piece comes, and nothing of what stands before it.
    """
    targets = np.zeros(len(counts), np.int64)
    for batch in batches:
        ids, lengths = np.asarray(batch.ids), np.asarray(batch.lengths)
        counted = np.arange(ids.shape[-1] - 1) < lengths[..., None] - 1
        targets += np.bincount(ids[..., 1:][counted], minlength=len(counts))
    smoothed = counts.astype(np.float64) + 1
    nats = -np.log(smoothed / smoothed.sum())
    return float(np.exp(targets @ nats / targets.sum()))
