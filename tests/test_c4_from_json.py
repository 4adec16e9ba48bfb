"""C4's files are built into the TFDS dataset c4/en, or read directly with their own validation files."""

import gzip
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from relora_jax import cli
from relora_jax.config import DataConfig
from relora_jax.data import tfds_source
from relora_jax.data.prepared import prepare
from relora_jax.errors import UserError
from scripts import c4_from_json
from tests.support.documents import texts


@pytest.fixture
def files(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Three train files and a validation file with C4's names."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def write(name: str, documents: list[str]) -> None:
        rows = [
            json.dumps({"text": text, "timestamp": "2019-04-25", "url": "http://x.org"}) for text in documents
        ]
        (tmp_path / name).write_bytes(gzip.compress(("\n".join(rows) + "\n").encode()))

    documents = texts(30)
    for k in range(3):
        write(f"c4-train.{k:05d}-of-00003.json.gz", documents[10 * k : 10 * k + 10])
    write("c4-validation.00000-of-00001.json.gz", ["é \0 held out", *texts(5, seed=1)])
    return tmp_path


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(c4_from_json.main, c4_from_json.__doc__, ["c4_from_json", *args])
    return int(stop.value.code or 0)


def test_dataset_has_the_documents_in_order_with_a_shard_per_file(files: pathlib.Path, capsys: Any) -> None:
    assert run("--input=c4-*.json.gz") == 0
    assert capsys.readouterr().out.strip().endswith("c4/en/3.1.0: 30 in train, 6 in validation")
    assert list(tfds_source.open_dataset("c4/en", "train")) == texts(30)
    assert next(iter(tfds_source.open_dataset("c4/en:3.1.0", "validation"))) == "é \0 held out"
    assert len(list((files / "tfds/c4/en/3.1.0").glob("*train*"))) == 3
    assert run("--input=c4-train*.json.gz") == 2
    assert "c4/en/3.1.0 already exists: remove it" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"{", b'{"text": 3}', b'{"txt": "x"}', b"\xff", b'{"text": "\\ud800"}'])
def test_invalid_line_is_named_and_no_dataset_is_built(files: pathlib.Path, capsys: Any, line: bytes) -> None:
    (files / "c4-train.x.json").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    assert run("--input=c4-*") == 2
    assert "c4-train.x.json, line 2 is " in capsys.readouterr().err
    assert not (files / "tfds/c4/en/3.1.0").exists()


def test_pattern_without_files_is_named(files: pathlib.Path, capsys: Any) -> None:
    assert run("--input=nothing*") == 2
    assert "--input 'nothing*' matches no file" in capsys.readouterr().err


def data(**changes: Any) -> DataConfig:
    settings = {"text": "c4-train*.json.gz", "validation_text": "c4-validation*.json.gz"} | changes
    return DataConfig(tokenizer="bpe(330)", sequence_length=20, **settings)


def test_files_read_directly_give_the_same_rows_as_the_dataset(files: pathlib.Path) -> None:
    direct = prepare(data())
    assert direct.train.manifest["documents"] == 30 and direct.validation.manifest["documents"] == 6
    assert run("--input=c4-*.json.gz") == 0
    dataset = prepare(data(text="", validation_text="", dataset="c4/en"))
    for one, other in ((direct.train, dataset.train), (direct.validation, dataset.validation)):
        assert one.rows == other.rows and np.array_equal(one.counts, other.counts)
        assert np.array_equal(one.read(range(one.rows))[0], other.read(range(other.rows))[0])


def test_train_rows_do_not_depend_on_the_validation_text(files: pathlib.Path) -> None:
    first = prepare(data()).train.path
    (files / "c4-validation.00001-of-00002.json.gz").write_bytes(
        gzip.compress(b'{"text": "more words"}\n' * 40)
    )
    again = prepare(data())
    assert again.train.path == first and again.validation.manifest["documents"] == 46


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "c4-*.json.gz"}, r"c4-validation\.00000.* is in data\.text and in data\.validation_text"),
        ({"text": "", "dataset": "c4/en"}, r"data\.validation_text .* needs data\.text, which is empty"),
        ({"validation_text": "none*.json"}, r"data\.validation_text 'none\*\.json' matches no file"),
    ],
)
def test_invalid_validation_text_is_rejected(
    files: pathlib.Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prepare(data(**changes))
