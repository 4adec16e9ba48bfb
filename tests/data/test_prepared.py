import dataclasses
import itertools
import json
import math
import os
import pickle
import sys

import numpy as np
import pytest

from relora_jax import prepare
from relora_jax.data import prepared, tfds_source
from relora_jax.data.packing import Packer
from relora_jax.data.rows import RowStore
from relora_jax.data.source import BadDocumentError
from relora_jax.data.stores import PrepareOptions
from relora_jax.storage import array_record, places
from relora_jax.tokenizer import tokenizer as tokenizers
from tests.support.documents import DATA, texts, write_dataset

EOS, DOCUMENTS = 1, 25
CONFIG = """
import dataclasses
from tests.support import small
from tests.support.documents import DATA

def get_config(arm='relora'):
    config = small.config()
    config.data = dataclasses.replace(DATA)
    return config
"""


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
    return tokenizers.train(lines, kind="bpe", vocab_size=380, path=tmp_path_factory.mktemp("t") / "t.model")


def rows_of(store: RowStore) -> np.ndarray:
    return store.read(range(store.rows))[0]


def packed(documents, tokenizer, packing="concatenate", length=30):
    packer = Packer(packing, length=length, eos=tokenizer.eos, pad=tokenizer.pad)
    return packer.add(tokenizer.encode_documents(documents)).ids


def halves(documents):
    """The documents of each of the two files of a toy dataset."""
    return documents[: len(documents) // 2], documents[len(documents) // 2 :]


def row_store(data, tokenizer, part="train", options=PrepareOptions()):  # noqa: B008
    [text] = [text for text in prepared._dataset(data, options) if text.parts == (part,)]
    return prepared._stores(data, text, tokenizer, options)[part]


def test_store_holds_the_packed_rows_of_its_documents(tokenizer, toy):
    store = row_store(DATA, tokenizer)
    rows = np.concatenate([packed(half, tokenizer) for half in halves(toy)])
    assert (rows_of(store) == rows).all()
    assert (store.read(range(store.rows))[1] == 31).all()
    assert store.tokens == rows.size == 31 * store.rows
    assert store.counts.tolist() == np.bincount(rows.ravel(), minlength=380).tolist()
    assert (rows == tokenizer.eos).sum() >= 20 and not ((rows[:, :-1] == EOS) & (rows[:, 1:] == EOS)).any()


def test_truncated_store_does_not_count_padding(tokenizer, toy, capsys):
    store = row_store(dataclasses.replace(DATA, packing="truncate", sequence_length=50), tokenizer)
    ids, lengths = store.read(range(store.rows))
    assert (ids == packed(toy, tokenizer, "truncate", 50)).all() and lengths.min() < 45
    assert store.rows == DOCUMENTS - 2 and store.tokens == lengths.sum() == store.counts.sum()
    real = ids[np.arange(51) < lengths[:, None]]
    assert store.counts.tolist() == np.bincount(real, minlength=380).tolist()
    assert 0.05 < store.manifest["dropped"] == pytest.approx(1 - store.tokens / store.manifest["given"])
    share = f"{100 * store.manifest['dropped']:.0f}% of the train tokens of toy:1.0.0 train are dropped"
    assert share in (message := capsys.readouterr().err) and "data.packing=concatenate" in message


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_rows_do_not_depend_on_how_many_documents_are_encoded_at_once(tokenizer, toy, monkeypatch, at_once):
    monkeypatch.setattr(tfds_source, "CHUNK_DOCUMENTS", at_once)
    rows = np.concatenate([packed(half, tokenizer) for half in halves(toy)])
    assert (rows_of(row_store(DATA, tokenizer)) == rows).all()


def test_rows_of_a_shard_depend_only_on_its_block(tokenizer, toy, monkeypatch):
    monkeypatch.setattr(tfds_source, "BLOCK_DOCUMENTS", 5)
    monkeypatch.setattr(tfds_source, "CHUNK_DOCUMENTS", 4)  # does not divide a block
    store = row_store(DATA, tokenizer)
    blocks = [half[k : k + 5] for half in halves(toy) for k in range(0, len(half), 5)]
    rows = [packed(block, tokenizer) for block in blocks]
    assert (rows_of(store) == np.concatenate(rows)).all()
    shards = store.manifest["shards"]
    assert [shard["rows"] for shard in shards] == [len(each) for each in rows]
    assert [shard["documents"] for shard in shards] == [5, 5, 2, 5, 5, 3]
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode_documents(toy) if len(ids))
    assert store.manifest["given"] == tokens
    assert store.manifest["dropped"] == pytest.approx((tokens - store.tokens) / tokens)


def test_manifest_has_the_key_and_the_properties_of_the_rows(tokenizer):
    store = row_store(DATA, tokenizer, "validation")
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert manifest["key"] == {
        "format": 4,
        "dataset": "toy:1.0.0",
        "split": "validation",
        "tokenizer": tokenizer.sha256,
        "eos": 1,
        "pad": 0,
        "packing": "concatenate",
        "sequence_length": 30,
        "block_documents": 65536,
        "train_tokens": 0,
    }
    names = (
        "format",
        "rows",
        "tokens",
        "documents",
        "vocab_size",
        "sequence_length",
        "eos",
        "pad",
        "packing",
    )
    facts = [manifest[name] for name in names]
    assert facts == [4, store.rows, store.tokens, 3, 380, 30, 1, 0, "concatenate"]
    assert manifest["text"] == {"files": 2, "of_files": 2, "of_documents": 3, "skipped": 0}
    assert manifest["record"] == "[('length', '<u4'), ('ids', '<u2', (31,))]"


def test_documents_start_with_the_bos_of_the_config():
    store = prepared.prepare(dataclasses.replace(DATA, bos_id=5, packing="truncate")).train
    without = prepared.prepare(dataclasses.replace(DATA, packing="truncate")).train
    assert (rows_of(store)[:, 0] == 5).all() and (rows_of(store)[:, 1:] == rows_of(without)[:, :-1]).all()
    assert store.manifest["key"]["bos"] == 5 and "bos" not in without.manifest["key"]


def test_every_setting_that_affects_rows_gets_a_separate_store(tokenizer, tmp_path):
    write_dataset("toy:1.1.0", {"train": texts(20), "validation": texts(3)})
    other = tokenizers.train(
        tokenizers._lines(texts(9)), kind="bpe", vocab_size=330, path=tmp_path / "o.model"
    )
    first = dataclasses.replace(DATA, dataset="toy:1.0.0")
    paths = {
        row_store(first, tokenizer).path,
        row_store(first, tokenizer, "validation").path,
        row_store(dataclasses.replace(first, train_split="train[:50%]"), tokenizer).path,
        row_store(first, other).path,
        row_store(first, dataclasses.replace(tokenizer, eos=5)).path,
        row_store(first, dataclasses.replace(tokenizer, pad=5)).path,
        row_store(first, dataclasses.replace(tokenizer, bos=0)).path,
        row_store(dataclasses.replace(first, sequence_length=20), tokenizer).path,
        row_store(dataclasses.replace(first, packing="truncate"), tokenizer).path,
        row_store(dataclasses.replace(first, train_tokens=31), tokenizer).path,
        row_store(DATA, tokenizer).path,  # the newest version now
    }
    assert len(paths) == 11
    budget = dataclasses.replace(first, train_tokens=31)  # does not affect the validation rows
    assert row_store(budget, tokenizer, "validation").path in paths


def test_second_call_reuses_everything_and_reads_no_text(monkeypatch):
    first = prepared.prepare(DATA)

    def never(*_):
        raise AssertionError("text is read again")

    monkeypatch.setattr(tfds_source, "open_dataset", never)
    again = prepared.prepare(DATA, PrepareOptions(build_limit_bytes=0))
    assert again.tokenizer.sha256 == first.tokenizer.sha256
    for before, now in ((first.train, again.train), (first.validation, again.validation)):
        assert before.path == now.path and (rows_of(before) == rows_of(now)).all()
    assert first.train.manifest["key"]["split"] == "train" and first.train.manifest["documents"] == DOCUMENTS


def test_rows_are_found_without_their_dataset(tmp_path, monkeypatch):
    def rows(dataset, **changes):
        return prepared.prepare(dataclasses.replace(DATA, dataset=dataset, **changes)).train.path

    first = prepared.prepare(DATA).train.path
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    assert rows("toy") == rows("toy:1.0.0") == first
    with pytest.raises(ValueError, match=r"dataset toy:1\.0\.0 is not in .*/empty: set TFDS_DATA_DIR"):
        rows("toy", sequence_length=20)  # only other rows exist
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "newer"))
    write_dataset("toy:1.10.0", {"train": texts(20), "validation": texts(3)})
    newer = rows("toy")
    assert newer != first == rows("toy:1.0.0")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "empty"))
    with pytest.raises(
        ValueError, match=r"several versions exist \(1\.0\.0, 1\.10\.0\): set data\.dataset=toy:"
    ):
        rows("toy")
    assert (rows("toy:1.0.0"), rows("toy:1.10.0")) == (first, newer)
    for path in places.cache_dir().glob("rows/*"):  # incomplete
        path.rename(path.with_suffix(".partial"))
    with pytest.raises(ValueError, match="dataset toy is not in"):
        rows("toy")


def test_large_dataset_is_refused_with_the_prepare_command(tokenizer):
    size = tfds_source.open_dataset("toy", "train").bytes
    command = "python -m relora_jax.prepare --config=c.py --config.a.b=3"
    options = PrepareOptions(build_limit_bytes=size - 1, command=command)
    for prepare_rows in (prepared.prepare, lambda data, _: row_store(data, tokenizer, options=options)):
        with pytest.raises(
            ValueError, match=r"must be prepared first: run .* --config=c\.py --config\.a\.b=3$"
        ):
            prepare_rows(DATA, options)
    cache = places.cache_dir()
    assert not list(cache.rglob("*.model")) and not list(cache.rglob("manifest.json"))
    assert prepared.prepare(DATA, PrepareOptions(build_limit_bytes=size)).train.rows > 0


def test_refusal_of_a_large_text_lists_how_its_other_stores_differ(tokenizer):
    for changes in ({"sequence_length": 20}, {"sequence_length": 9, "packing": "truncate"}):
        row_store(dataclasses.replace(DATA, **changes), tokenizer)
    row_store(dataclasses.replace(DATA, train_split="train[:50%]"), tokenizer)
    with pytest.raises(ValueError) as raised:
        row_store(DATA, tokenizer, options=PrepareOptions(build_limit_bytes=0))
    differences = str(raised.value).partition("(rows of this text exist with ")[2]
    assert sorted(differences[:-1].split("; ")) == [
        "packing truncate, this config has concatenate and sequence_length 9, this config has 30",
        "sequence_length 20, this config has 30",
    ]


def test_progress_counts_documents_and_tokens(tokenizer, capfd):
    row_store(DATA, tokenizer)
    assert capfd.readouterr() == ("", "")
    row_store(dataclasses.replace(DATA, sequence_length=20), tokenizer, options=PrepareOptions(progress=True))
    output = capfd.readouterr().err
    assert f"{DOCUMENTS}/{DOCUMENTS}" in output and "tokens/s" in output


def test_text_too_short_for_a_row_is_an_error_and_leaves_no_store(tokenizer):
    with pytest.raises(ValueError, match=r"toy:1\.0\.0 train.* too little text .* choose a smaller length"):
        row_store(dataclasses.replace(DATA, sequence_length=100_000), tokenizer)
    assert not list(places.cache_dir().rglob("manifest.json"))


def test_incompletely_written_rows_make_no_store(tokenizer, monkeypatch):
    write, calls = array_record.ArrayRecordWriter.write, itertools.count()
    half = lambda self, row: next(calls) % 2 or write(self, row)  # noqa: E731
    monkeypatch.setattr(array_record.ArrayRecordWriter, "write", half)
    with pytest.raises(OSError, match=r"\.array_record\.\d+\.new holds \d+ of \d+ records: is the disk full"):
        row_store(DATA, tokenizer)
    stores = places.cache_dir().glob("rows/*/*/manifest.json")
    assert not [path for path in stores if path.parents[1].suffix == ""]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"packing": "scatter"}, "data.packing 'scatter'"),
        ({"sequence_length": 0}, "data.sequence_length 0"),
        ({"train_tokens": -1}, "data.train_tokens -1"),
        ({"text": "*.txt", "validation_fraction": 0.0}, "data.validation_fraction 0.0 must lie in (0, 1)"),
        ({"text": "*.txt", "validation_fraction": 1.0}, "data.validation_fraction 1.0"),
        ({"dataset": ""}, "set data.text to files of your own, or data.dataset"),
        ({"train_split": "trian"}, "no split 'trian'"),
        ({"validation_split": "test"}, "no split 'test'"),
        ({"dataset": "c4/en"}, "c4/en is not in"),
        ({"tokenizer": "bpe(x)"}, "bpe(x)"),
    ],
)
def test_bad_setting_is_reported_in_one_line(change, message):
    with pytest.raises(ValueError) as raised:
        prepared.prepare(dataclasses.replace(DATA, **change))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_command_prepares_any_size_and_prints_a_summary(tmp_path, monkeypatch, capsys):
    calls, build = [], prepared.prepare
    spy = lambda data, options: calls.append(options) or build(data, options._replace(workers=1))  # noqa: E731
    monkeypatch.setattr(prepared, "prepare", spy)
    (tmp_path / "c.py").write_text(CONFIG)
    args = ["prepare", f"--config={tmp_path}/c.py", "--config.data.sequence_length=20"]
    args.append("--config.model.vocab_size=380")
    assert prepare.main(args) == prepare.main([*args, "--workers=3"]) == 0
    store = build(dataclasses.replace(DATA, sequence_length=20)).train
    assert [(options.build_limit_bytes, options.workers) for options in calls] == [
        (math.inf, len(os.sched_getaffinity(0))),
        (math.inf, 3),
    ]
    message = f"train: {store.rows:,} rows, {store.tokens:,} tokens of 25 of 25 documents in 2 block(s)"
    assert f"{message} (2 of 2 files): {store.path}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--workers=all must be an integer of at least 0"):
        prepare.main([*args, "--workers=all"])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_command_skips_bad_documents_if_it_is_asked_to(tmp_path, capsys):
    (tmp_path / "c.py").write_text(CONFIG)
    for name, seed in (("train", 0), ("held", 1)):
        lines = [json.dumps({"text": text}) for text in texts(20, seed=seed)] + ['{"text": null}'] * (
            2 - seed
        )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    args = ["prepare", f"--config={tmp_path}/c.py", "--workers=1", "--config.model.vocab_size=380"]
    args += [f"--text={tmp_path}/train.jsonl", f"--validation_text={tmp_path}/held.jsonl"]
    with pytest.raises(BadDocumentError, match=r"train\.jsonl, line 21: .*--skip_bad_documents"):
        prepare.main(args)
    assert prepare.main([*args, "--skip_bad_documents"]) == 0
    output = capsys.readouterr()
    assert f"  {tmp_path}/train.jsonl, line 22: 'text' is null, not text\n" in output.err
    assert prepare.main(args) == 0  # the rows exist now
    again = capsys.readouterr().out
    for summary in (output.out, again):
        assert "of 20 documents (2 skipped as bad) in" in summary
        assert "of 20 documents (1 skipped as bad) in" in summary
    args = [*args[:-1], "--config.data.validation_fraction=0.3", "--skip_bad_documents"]
    assert prepare.main(args) == 0  # one text: its bad documents are said once
    assert capsys.readouterr().out.count("skipped as bad") == 1


def test_bad_documents_of_a_dataset_are_skipped_in_their_places(tokenizer, toy, monkeypatch):
    monkeypatch.setattr(tfds_source, "BLOCK_DOCUMENTS", 5)
    documents = [*toy[:7], b"caf\xe9 ", *toy[8:20], b"\xff", b"\xff", *toy[22:]]
    write_dataset("latin:1.0.0", {"train": documents, "validation": ["v"]})
    data = dataclasses.replace(DATA, dataset="latin")
    with pytest.raises(BadDocumentError, match=r"document 7 of latin:1\.0\.0 train is not UTF-8"):
        row_store(data, tokenizer)
    skipping = PrepareOptions(skip_bad_documents=True)
    store = row_store(data, tokenizer, options=skipping)
    blocks = [half[k : k + 5] for half in halves(documents) for k in range(0, len(half), 5)]
    rows = [packed([text for text in block if isinstance(text, str)], tokenizer) for block in blocks]
    assert (rows_of(store) == np.concatenate(rows)).all()
    assert store.manifest["text"]["skipped"] == 3 and store.manifest["documents"] == DOCUMENTS - 3
    for skip in (False, True):  # as a worker gets it
        source = pickle.loads(pickle.dumps(tfds_source.open_dataset("latin", "train", skip)))
        assert source.skip_bad_documents == skip


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_command_rejects_too_many_pieces_before_building_rows(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    args = ["prepare", f"--config={tmp_path}/c.py", "--workers=1"]
    with pytest.raises(ValueError, match=r"has 380 pieces and model\.vocab_size is 379: set it to 380"):
        prepare.main([*args, "--config.model.vocab_size=379"])
    assert not (places.cache_dir() / "rows").exists()
    assert prepare.main([*args, "--config.model.vocab_size=380"]) == 0


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize("terminal", [True, False])
def test_command_draws_its_progress_bar_only_on_a_terminal(tmp_path, monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    (tmp_path / "c.py").write_text(CONFIG)
    args = ["prepare", f"--config={tmp_path}/c.py", "--workers=1", "--config.model.vocab_size=380"]
    assert prepare.main(args) == 0
    assert ("tokens/s" in capsys.readouterr().err) == terminal
