"""Text files for `data.text`, in toy blocks."""

import dataclasses
import gzip
import json

import pytest

from relora_jax.config import DataConfig
from relora_jax.tokenizer import tokenizer as tokenizers
from tests.support.documents import texts

SIZES = (9, 23, 14, 1, 30)  # documents per file
BLOCK, LENGTH = 8, 20  # documents per block, sequence length


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five files of text, and a tokenizer."""
    folder = tmp_path_factory.mktemp("own")
    documents = iter(texts(sum(SIZES)))
    for k, size in enumerate(SIZES):
        lines = "".join(json.dumps({"text": next(documents)}) + "\n" for _ in range(size))
        (folder / f"{k}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    tokenizers.train(tokenizers._lines(texts(40)), kind="bpe", vocab_size=380, path=folder / "t.model")
    return folder


def config(folder, **changes):
    data = DataConfig(
        text=str(folder / "*.jsonl.gz"),
        validation_fraction=0.3,
        tokenizer=str(folder / "t.model"),
        sequence_length=LENGTH,
    )
    return dataclasses.replace(data, **changes)
