"""Writes toy TFDS datasets, with TFDS itself, and row stores in the format that data/rows.py documents."""

import contextlib
import io
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from relora_jax.config import DataConfig
from relora_jax.data import sotu
from relora_jax.data.rows import FORMAT, RowStore

DATA = DataConfig(
    dataset="toy",
    train_split="train",
    validation_split="validation",
    tokenizer="bpe(380)",
    sequence_length=30,
)
WORDS = ["the", "union", "of", "states", "is", "strong", "and", "people", "are", "free", "to", "keep", "it"]


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Documents of a few paragraphs each, which start with their number."""
    rng = np.random.default_rng(seed)
    return [
        f"Number {i}. " + "\n\n".join(" ".join(rng.choice(WORDS, rng.integers(3, 30))) for _ in range(3))
        for i in range(count)
    ]


def write_dataset(name: str, splits: dict[str, list[Any]], *, feature: str = "text") -> Path:
    """The directory of dataset "name[/config]:version" under $TFDS_DATA_DIR, as TFDS itself writes it."""
    folder, _, number = name.partition(":")

    class Dataset(tfds.core.ShardBasedBuilder, skip_registration=True):
        name = folder.split("/")[0]
        VERSION = tfds.core.Version(number)
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config) for config in folder.split("/")[1:]]
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            features = tfds.features.FeaturesDict(
                {feature: tfds.features.Text(), "url": tfds.features.Text()}
            )
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _shard_iterators_per_split(self, dl_manager: object) -> dict[str, Any]:
            def shard(documents: list[Any]) -> Any:
                return lambda: ((str(i), {feature: t, "url": "u"}) for i, t in enumerate(documents))

            halves = {s: (d[: len(d) // 2], d[len(d) // 2 :]) for s, d in splits.items()}
            return {split: [shard(half) for half in both if half] for split, both in halves.items()}

    with contextlib.redirect_stdout(io.StringIO()):
        builder = Dataset(data_dir=os.environ["TFDS_DATA_DIR"], file_format="array_record")
        builder.download_and_prepare()
    return Path(builder.data_dir)


def write_store(
    path: Path, shards: list[np.ndarray], lengths: np.ndarray, *, vocab_size: int, eos: int = 1
) -> RowStore:
    """A row store of `shards` [rows, S] whose rows have the true `lengths`: uint32 length, uint16 ids."""
    path.mkdir(parents=True)
    listed, remaining = [], iter(lengths)
    for rows in shards:
        file = f"{len(listed):05d}.array_record"
        writer = ArrayRecordWriter(str(path / file), "group_size:1")
        for ids in rows:
            writer.write(np.uint32(next(remaining)).tobytes() + ids.astype("<u2").tobytes())
        writer.close()
        listed.append({"file": file, "rows": len(rows)})
    ids = np.concatenate(shards)
    facts = {
        "format": FORMAT,
        "eos": eos,
        "rows": len(ids),
        "tokens": int(lengths.sum()),
        "vocab_size": vocab_size,
        "shards": listed,
    }
    (path / "manifest.json").write_text(json.dumps({**facts, "sequence_length": ids.shape[1] - 1}))
    np.save(path / "counts.npy", np.bincount(ids.ravel(), minlength=vocab_size))
    return RowStore.open(path)


NAMES = ["<pad>", "</s>", "<unk>", "<s>", "<0x0A>", "<0x3C>", "<0x0a>", "<0xE2><0x96><0x81>", "</s", "<sep>"]
RUNS = ["a", "ab", "-", "0", " ", "\u2581", "\n", "=", "the ", "aba", "\t"]
MARKS = [
    "\u2581",
    "\0",
    "\1",
    "e\u0301",
    "\ufb01",
    "\u0301",
    "\ufdd0",
    "\uffff",
    "\r\n",
    "\u200b",
    "日本",
    "😀",
]


def hard_documents(pieces: list[str], *, count: int = 1000, seed: int = 0) -> list[str]:
    """Documents on which tokenizers may differ: paragraphs of addresses and unusual characters."""
    rng = random.Random(seed)
    addresses = "\n\n".join(file.read_text() for file in sotu.speeches()[::20])
    paragraphs = [text for text in addresses.split("\n\n") if text]

    def part() -> str:
        group = rng.choice([NAMES, MARKS, pieces, [" ", "\n", "\n\n", "  ", "<", ">", "/"]])
        if rng.random() < 0.2:
            return rng.choice(paragraphs)[: rng.randint(1, 60)]
        if rng.random() < 0.2:
            return chr(rng.choice([rng.randrange(0x20, 0xD800), rng.randrange(0xE000, 0x11_0000)]))
        return rng.choice(RUNS) * rng.randint(1, 40) if rng.random() < 0.2 else rng.choice(group)

    fixed = ["", *NAMES, *MARKS, *(run * n for run in RUNS for n in (1, 2, 3, 7, 40)), " a", "a ", "  a  "]
    documents = fixed + rng.sample(paragraphs, count // 2)
    return documents + [
        "".join(part() for _ in range(rng.randint(1, 20))) for _ in range(count - len(documents))
    ]
