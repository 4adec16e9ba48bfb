"""Documents -> rows of sequence_length + 1 ids in ArrayRecord, made once and found by what decides them.

    python -m relora_jax.prepare --config=configs/350m.py

A block is BLOCK_DOCUMENTS consecutive documents and gives one shard: documents are ended by one
EOS, concatenated and cut into rows that do not overlap; the rest of a block is dropped. So a row
depends on its own block alone. A store is a directory: manifest.json, counts.npy (the count of
each piece), and the shards, whose records `data.record_type` lays out.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Int32, Int64
from tqdm import tqdm

from relora_jax import flags, places, text
from relora_jax import tokenizer as tokenizers
from relora_jax.config import DataConfig
from relora_jax.data import COUNTS, FORMAT, MANIFEST, RowStore, record_type
from relora_jax.text import Documents
from relora_jax.tokenizer import Tokenizer

# About 31M tokens, 65 MB and half a minute of C4: small enough to lose, and few enough files (5,600
# for all of C4, 390 for 12B tokens) to be open at once.
BLOCK_DOCUMENTS = 65_536
ENCODED_AT_ONCE = 128  # documents in memory at a time
BUILD_LIMIT_BYTES = 100_000_000  # above it, `train` does not prepare by itself
COMMAND = "python -m relora_jax.prepare --config=..."


class Prepared(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    train: RowStore
    validation: RowStore


def prepare(
    data: DataConfig, *, build_limit_bytes: int | float = BUILD_LIMIT_BYTES, progress: bool = False
) -> Prepared:
    """Tokenizer and rows of both splits, found or made.

    ValueError where something is to be made of a dataset above `build_limit_bytes` (on disk).
    """
    tokenizer = tokenizers.find(
        data.tokenizer,
        lambda: _documents(data, data.train_split, build_limit_bytes),
        key=f"{text.dataset_version(data.dataset)} {data.train_split}",
        eos_id=data.eos_id,
        pad_id=data.pad_id,
    )
    stores = {  # the smaller split first: a wrong name shows before hours of work
        split: row_store(data, split, tokenizer, build_limit_bytes=build_limit_bytes, progress=progress)
        for split in (data.validation_split, data.train_split)
    }
    return Prepared(tokenizer, stores[data.train_split], stores[data.validation_split])


def row_store(
    data: DataConfig,
    split: str,
    tokenizer: Tokenizer,
    *,
    build_limit_bytes: int | float = BUILD_LIMIT_BYTES,
    progress: bool = False,
) -> RowStore:
    """The rows of a split, found by their key or made; a kill leaves no store that looks whole."""
    key = store_key(data, split, tokenizer)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]

    def make(aside: Path) -> None:
        documents = _documents(data, split, build_limit_bytes)
        with _bar(len(documents), split, progress) as advance:
            _write(aside, documents, tokenizer, key, advance)

    return RowStore.open(
        places.make_once(places.cache_dir() / "rows" / name, make, variable="XDG_CACHE_HOME")
    )


def store_key(data: DataConfig, split: str, tokenizer: Tokenizer) -> dict[str, Any]:
    """Everything that decides a store's rows."""
    if data.packing != "concatenate":
        raise ValueError(f"data.packing={data.packing} is not known: write concatenate")
    if data.sequence_length < 1:
        raise ValueError(f"data.sequence_length={data.sequence_length} holds no token: write 1 or more")
    return {
        "format": FORMAT,
        "dataset": text.dataset_version(data.dataset),
        "split": split,
        "tokenizer": tokenizer.sha256,
        "packing": data.packing,
        "sequence_length": data.sequence_length,
        "block_documents": BLOCK_DOCUMENTS,
    }


def pack(documents: Iterable[Int32[np.ndarray, " _"]], eos: int, length: int) -> Int32[np.ndarray, "rows S"]:
    """[d1 eos d2 eos ...] cut into rows of length + 1, the rest dropped; an empty document gives nothing."""
    return np.concatenate([np.empty((0, length + 1), np.int32), *_rows([documents], eos, length)])


def _rows(
    batches: Iterable[Iterable[Int32[np.ndarray, " _"]]], eos: int, length: int
) -> Iterator[Int32[np.ndarray, "rows S"]]:
    """`pack`, a batch of documents at a time: the rest of a batch begins the next one's rows."""
    rest = np.empty(0, np.int32)
    for documents in batches:
        # one EOS, never two: not after a text that ends in one, not for a text that is empty
        ended = [ids if ids[-1] == eos else np.append(ids, np.int32(eos)) for ids in documents if len(ids)]
        ids = np.concatenate([rest, *ended])
        rows = len(ids) // (length + 1)
        yield ids[: rows * (length + 1)].reshape(rows, length + 1)
        rest = ids[rows * (length + 1) :]


def _documents(data: DataConfig, split: str, build_limit_bytes: int | float) -> Documents:
    documents = text.open_dataset(data.dataset, split)
    if documents.bytes > build_limit_bytes:
        size, limit = (f"{number / 1e6:,.0f} MB" for number in (documents.bytes, build_limit_bytes))
        raise ValueError(
            f"{documents.version} holds {size}, and above {limit} rows are made only by command: {COMMAND}"
        )
    return documents


def _write(
    aside: Path,
    documents: Documents,
    tokenizer: Tokenizer,
    key: dict[str, Any],
    advance: Callable[[int, int], None],
) -> None:
    """A store of `documents` in `aside`: a shard for each block, then the counts, then the manifest."""
    aside.mkdir()
    length, counts, shards = key["sequence_length"], np.zeros(tokenizer.pieces, np.int64), []
    for start in range(0, len(documents), BLOCK_DOCUMENTS):
        block = range(start, min(start + BLOCK_DOCUMENTS, len(documents)))
        file = f"{len(shards):05d}.array_record"
        rows = _rows(_encode(documents, block, tokenizer, advance), tokenizer.eos, length)
        counts_of_block = _write_shard(aside / file, rows, length, tokenizer.pieces)
        counts += counts_of_block
        shards.append(
            {"file": file, "documents": len(block), "rows": int(counts_of_block.sum()) // (length + 1)}
        )
    if not counts.any():
        what = f"{key['dataset']} {key['split']} has too little text for one row"
        raise ValueError(f"{what} of data.sequence_length={length}: choose a smaller length or another split")
    manifest = {
        "key": key,
        "format": FORMAT,
        "sequence_length": length,
        "pieces": tokenizer.pieces,
        "documents": len(documents),
        "rows": sum(shard["rows"] for shard in shards),
        "tokens": int(counts.sum()),
        "record": str(record_type(sequence_length=length, pieces=tokenizer.pieces)),
        "shards": shards,
    }
    np.save(aside / COUNTS, counts)
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    RowStore.open(aside)  # a full disk shows here, before the store has its name


def _encode(
    documents: Documents, block: range, tokenizer: Tokenizer, advance: Callable[[int, int], None]
) -> Iterator[Sequence[Int32[np.ndarray, " _"]]]:
    """The ids of a block's documents, ENCODED_AT_ONCE of them at a time."""
    for start in block[::ENCODED_AT_ONCE]:
        texts = documents[start : min(start + ENCODED_AT_ONCE, block.stop)]
        encoded = tokenizer.encode_documents(texts)
        yield encoded
        advance(len(texts), sum(map(len, encoded)))


def _write_shard(
    file: Path, batches: Iterable[Int32[np.ndarray, "rows S"]], length: int, pieces: int
) -> Int64[np.ndarray, " pieces"]:
    """One ArrayRecord file of rows; the count of each piece in it."""
    counts = np.zeros(pieces, np.int64)
    # one record a group, or a row costs the reading of its group; ids compress too little to be worth it
    writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    try:
        for ids in batches:
            records = np.zeros(len(ids), record_type(sequence_length=length, pieces=pieces))
            records["length"], records["ids"] = length + 1, ids
            for record in records:
                writer.write(record.tobytes())
            counts += np.bincount(ids.ravel(), minlength=pieces)
    finally:
        writer.close()
    return counts


@contextlib.contextmanager
def _bar(documents: int, split: str, progress: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with tokens/s and the time left, told (documents, tokens) as they are done."""
    tokens = 0
    with tqdm(total=documents, desc=split, unit=" documents", disable=not progress) as bar:

        def advance(more_documents: int, more_tokens: int) -> None:
            nonlocal tokens
            tokens += more_tokens
            elapsed_s = bar.format_dict["elapsed"] if progress else 0
            bar.set_postfix_str(f"{tokens / elapsed_s:,.0f} tokens/s" if elapsed_s else "", refresh=False)
            bar.update(more_documents)

        yield advance


def main(arguments: list[str]) -> int:
    """Prepare what --config names, whatever its size; the exit code."""
    config, _ = flags.parse(arguments)
    prepared = prepare(config.data, build_limit_bytes=math.inf, progress=True)
    for name, store in (("train", prepared.train), ("validation", prepared.validation)):
        print(f"{name}: {store.rows:,} rows, {store.tokens:,} tokens in {store.path}")
    return 0


if __name__ == "__main__":
    flags.main(main, __doc__)
