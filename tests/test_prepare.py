import dataclasses
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_jax import places, prepare, text
from relora_jax import tokenizer as tokenizers
from relora_jax.config import DataConfig
from relora_jax.data import RowStore, record_type
from tests.documents import texts, write_dataset

EOS, DOCUMENTS = 1, 25
DATA = DataConfig(
    dataset="toy",
    train_split="train",
    validation_split="validation",
    tokenizer="bpe(380)",
    sequence_length=30,
)


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """Dataset toy:1.0.0: 25 documents, the last two empty, and 3 of validation; returns its train texts."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    train = [*texts(DOCUMENTS - 2), "", ""]
    write_dataset("toy:1.0.0", {"train": train, "validation": texts(3, seed=1)})
    return train


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    lines = tokenizers._lines(texts(40))
    return tokenizers.train(lines, kind="bpe", pieces=380, path=tmp_path_factory.mktemp("t") / "t.model")


def rows_of(store: RowStore) -> np.ndarray:
    return store.read(range(store.rows))[0]


@settings(deadline=None, max_examples=100)
@given(documents=st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12), length=st.integers(1, 9))
def test_rows_are_the_documents_one_after_another_each_with_one_end(documents, length):
    stream = []
    for ids in documents:
        stream += ids if not ids or ids[-1] == EOS else [*ids, EOS]
    rows = prepare.pack([np.array(ids, np.int32) for ids in documents], EOS, length)
    whole = len(stream) // (length + 1)
    assert rows.dtype == np.int32 and rows.shape == (whole, length + 1)
    assert rows.ravel().tolist() == stream[: whole * (length + 1)]


def test_store_holds_the_packed_rows_of_its_documents(tokenizer, toy):
    store = prepare.row_store(DATA, "train", tokenizer)
    rows = prepare.pack(tokenizer.encode_documents(toy), tokenizer.eos, 30)
    assert (rows_of(store) == rows).all()
    assert (store.read(range(store.rows))[1] == 31).all()
    assert store.tokens == rows.size == 31 * store.rows
    assert store.counts.tolist() == np.bincount(rows.ravel(), minlength=380).tolist()
    assert (rows == tokenizer.eos).sum() >= 20 and not ((rows[:, :-1] == EOS) & (rows[:, 1:] == EOS)).any()


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_rows_do_not_depend_on_how_many_documents_are_encoded_at_once(tokenizer, toy, monkeypatch, at_once):
    monkeypatch.setattr(prepare, "ENCODED_AT_ONCE", at_once)
    rows = prepare.pack(tokenizer.encode_documents(toy), tokenizer.eos, 30)
    assert (rows_of(prepare.row_store(DATA, "train", tokenizer)) == rows).all()


def test_rows_of_a_shard_are_those_of_its_block_alone(tokenizer, toy, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_DOCUMENTS", 6)
    monkeypatch.setattr(prepare, "ENCODED_AT_ONCE", 4)  # does not divide a block
    store = prepare.row_store(DATA, "train", tokenizer)
    blocks = [
        prepare.pack(tokenizer.encode_documents(toy[k : k + 6]), EOS, 30) for k in range(0, DOCUMENTS, 6)
    ]
    assert (rows_of(store) == np.concatenate(blocks)).all()
    shards = store.manifest["shards"]
    assert [shard["rows"] for shard in shards] == [len(block) for block in blocks]
    assert [shard["documents"] for shard in shards] == [6, 6, 6, 6, 1] and shards[4]["rows"] == 0


def test_manifest_tells_what_decides_the_rows_and_what_they_are(tokenizer):
    store = prepare.row_store(DATA, "validation", tokenizer)
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["key"] == {
        "format": 2,
        "dataset": "toy:1.0.0",
        "split": "validation",
        "tokenizer": tokenizer.sha256,
        "packing": "concatenate",
        "sequence_length": 30,
        "block_documents": 65536,
    }
    facts = [
        manifest[name]
        for name in ("format", "rows", "tokens", "documents", "pieces", "eos", "sequence_length")
    ]
    assert facts == [2, store.rows, store.tokens, 3, 380, tokenizer.eos, 30]
    assert manifest["record"] == "[('length', '<u4'), ('ids', '<u2', (31,))]"


def test_anything_that_decides_the_rows_gives_a_store_of_its_own(tokenizer, tmp_path):
    write_dataset("toy:1.1.0", {"train": texts(20), "validation": texts(3)})
    other = tokenizers.train(tokenizers._lines(texts(9)), kind="bpe", pieces=330, path=tmp_path / "o.model")
    first = dataclasses.replace(DATA, dataset="toy:1.0.0")
    paths = {
        prepare.row_store(first, "train", tokenizer).path,
        prepare.row_store(first, "validation", tokenizer).path,
        prepare.row_store(first, "train[:50%]", tokenizer).path,
        prepare.row_store(first, "train", other).path,
        prepare.row_store(dataclasses.replace(first, sequence_length=20), "train", tokenizer).path,
        prepare.row_store(DATA, "train", tokenizer).path,  # the newest version now
    }
    assert len(paths) == 6


def test_second_call_finds_everything_and_reads_no_text(monkeypatch):
    first = prepare.prepare(DATA)

    def never(*_):
        raise AssertionError("text is read again")

    monkeypatch.setattr(text, "open_dataset", never)
    again = prepare.prepare(DATA, build_limit_bytes=0)
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    for before, now in ((first.train, again.train), (first.validation, again.validation)):
        assert before.path == now.path and (rows_of(before) == rows_of(now)).all()
    assert first.train.manifest["key"]["split"] == "train" and first.train.manifest["documents"] == DOCUMENTS


def test_large_dataset_is_prepared_only_by_the_command(tokenizer):
    size = text.open_dataset("toy", "train").bytes
    for refused in (
        lambda: prepare.prepare(DATA, build_limit_bytes=size - 1),
        lambda: prepare.row_store(DATA, "train", tokenizer, build_limit_bytes=size - 1),
    ):
        with pytest.raises(ValueError, match=r"python -m relora_jax\.prepare --config=\.\.\."):
            refused()
    assert not list(places.cache_dir().rglob("*.model")) and not list(
        places.cache_dir().rglob("manifest.json")
    )
    assert prepare.prepare(DATA, build_limit_bytes=size).train.rows > 0


def test_progress_counts_documents_and_tokens(tokenizer, capfd):
    prepare.row_store(DATA, "validation", tokenizer)
    assert capfd.readouterr() == ("", "")
    prepare.row_store(DATA, "train", tokenizer, build_limit_bytes=math.inf, progress=True)
    written = capfd.readouterr().err
    assert f"{DOCUMENTS}/{DOCUMENTS}" in written and "tokens/s" in written


def test_killed_preparation_leaves_nothing_that_looks_whole(tmp_path):
    code = (
        "import os; from relora_jax import prepare; from tests.test_prepare import DATA\n"
        "prepare.ENCODED_AT_ONCE = 2; whole = prepare._rows\n"
        "def cut(*arguments):\n"
        "    for k, rows in enumerate(whole(*arguments)):\n"
        "        k == 5 and os._exit(9)\n"
        "        yield rows\n"
        "prepare._rows = cut; prepare.prepare(DATA)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    folder = places.cache_dir() / "rows"
    assert [entry.suffix for entry in folder.iterdir() if entry.is_dir() and "partial" in entry.name]
    expected = prepare.pack(
        (prepared := prepare.prepare(DATA)).tokenizer.encode_documents(
            list(text.open_dataset("toy", "train"))
        ),
        EOS,
        30,
    )
    assert (rows_of(prepared.train) == expected).all()
    assert len([entry for entry in folder.iterdir() if entry.is_dir()]) == 2


def test_text_too_short_for_a_row_is_an_error_and_leaves_no_store(tokenizer):
    with pytest.raises(ValueError, match=r"toy:1\.0\.0 train has too little text .* choose a smaller length"):
        prepare.row_store(dataclasses.replace(DATA, sequence_length=100_000), "train", tokenizer)
    assert not list(places.cache_dir().rglob("manifest.json"))


def test_rows_that_did_not_reach_the_disk_make_no_store(tokenizer, monkeypatch):
    write, calls = prepare.ArrayRecordWriter.write, itertools.count()
    half = lambda self, row: next(calls) % 2 or write(self, row)  # noqa: E731
    monkeypatch.setattr(prepare.ArrayRecordWriter, "write", half)
    with pytest.raises(ValueError, match="is no whole row store"):
        prepare.row_store(DATA, "train", tokenizer)
    assert not [path for path in places.cache_dir().glob("rows/*/manifest.json") if path.parent.suffix == ""]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"packing": "scatter"}, "data.packing=scatter"),
        ({"sequence_length": 0}, "data.sequence_length=0"),
        ({"train_split": "trian"}, "no split 'trian'"),
        ({"validation_split": "test"}, "no split 'test'"),
        ({"dataset": "c4/en"}, "c4/en is not in"),
        ({"tokenizer": "bpe(x)"}, "bpe(x)"),
    ],
)
def test_wrong_setting_is_said_in_one_line(change, said):
    with pytest.raises(ValueError) as raised:
        prepare.prepare(dataclasses.replace(DATA, **change))
    assert said in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(("pieces", "width"), [(65_536, 2), (65_537, 4)])
def test_largest_id_is_stored_and_read_back(tokenizer, pieces, width):
    class Wide(sentencepiece.SentencePieceProcessor):
        def encode(self, texts, *_):
            return [[pieces - 1] * 50 for _ in texts]

    wide = dataclasses.replace(tokenizer, pieces=pieces, sha256="w", model=Wide())
    store = prepare.row_store(DATA, "train", wide)
    assert rows_of(store).max() == pieces - 1 and store.counts[pieces - 1] > 900
    assert record_type(sequence_length=30, pieces=pieces).itemsize == 4 + 31 * width


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_command_prepares_whatever_the_size_and_says_what_it_made(tmp_path, monkeypatch, capsys):
    limits, made = [], prepare.prepare
    spy = lambda data, **options: limits.append(options["build_limit_bytes"]) or made(data, **options)  # noqa: E731
    monkeypatch.setattr(prepare, "prepare", spy)
    settings = (
        "from tests import small\nfrom tests.test_prepare import DATA\n"
        "def get_config(arm='relora'):\n    made = small.config()\n    made.data = DATA\n    return made\n"
    )
    (tmp_path / "c.py").write_text(settings)
    assert prepare.main(["prepare", f"--config={tmp_path}/c.py", "--config.data.sequence_length=20"]) == 0
    store = made(dataclasses.replace(DATA, sequence_length=20)).train
    assert limits == [math.inf]
    assert f"train: {store.rows:,} rows, {store.tokens:,} tokens in {store.path}" in capsys.readouterr().out
