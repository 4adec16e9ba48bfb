import pathlib

import pytest

from relora_jax import cli
from relora_jax.tokenizer import tokenizer
from scripts import train_tokenizer
from tests.support.commands import TOY
from tests.support.documents import texts, write_dataset


@pytest.fixture(autouse=True)
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "toy.py").write_text(TOY)
    write_dataset("toy:1.0.0", {"train": texts(60), "validation": ["\u65e5"]})


def run(*args):
    cli.main(train_tokenizer.main, train_tokenizer.__doc__, ["train_tokenizer", *args])


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 350), ("unigram", 310)])
def test_model_of_the_train_documents_is_lossless(kind, vocab_size, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--config=toy.py", f"--kind={kind}", f"--vocab_size={vocab_size}", "--output=new/my.model")
    assert stop.value.code == 0
    model = tokenizer.find("new/my.model", list, "key")
    assert (
        f"{kind} model of {vocab_size} pieces: new/my.model (sha256 {model.sha256})"
        in capsys.readouterr().out
    )
    assert model.vocab_size == vocab_size
    # one piece for a word of the text, bytes for a character that only the validation split has
    assert [len(ids) for ids in model.encode_documents(["people", "\u65e5"])] == [1, 3]
    for text in (*texts(9), "\u65e5 \n\n  x"):
        assert model.decode(model.encode_documents([text])[0]) == text
    assert sorted(p.name for p in pathlib.Path("new").iterdir()) == ["my.model"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--config=toy.py --output=my.model", "my.model already exists: remove it"),
        ("--config=toy.py --output=x.json", "--output=x.json must be a file name that ends in .model"),
        ("--config=toy.py", "--output= must be a file name that ends in .model"),
        ("--config=toy.py --output=x.model --kind=word", "--kind=word must be bpe or unigram"),
        ("--config=toy.py --output=x.model --vocab_size=many", "--vocab_size=many must be an integer"),
        ("--config=toy.py --output=x.model --vocab_size=0", "--vocab_size=0"),
        (
            "--config=toy.py --output=x.model --vocab_size=100000",
            "no bpe model of 100000 pieces can be trained",
        ),
        ("--config=nowhere.py --output=x.model", "nowhere.py"),
        ("--config=toy.py --config.data.dataset=none --output=x.model", "none is not in"),
        ("--output=x.model", "no text to train on: pass --config="),
        ("--txt=a.jsonl --output=x.model", "txt"),
    ],
)
def test_error_is_one_line_and_changes_no_file(line, message, capsys):
    pathlib.Path("my.model").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        run(*line.split())
    errors = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and errors[-1].startswith("error: ") and message in errors[-1]
    assert len(errors) == 1 or errors[0] == "reading text and training a vocabulary of 100,000 pieces"
    assert pathlib.Path("my.model").read_text() == "mine" and not pathlib.Path("x.model").exists()


def test_bad_documents_are_skipped_if_it_is_asked_for(tmp_path, capsys):
    lines = [f'{{"text": "{text.split()[2]} people of the union"}}' for text in texts(400)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": null}']))
    args = ["--text=a.jsonl", "--output=x.model", "--vocab_size=290"]
    for flags, code in (([], 2), (["--skip_bad_documents"], 0)):
        with pytest.raises(SystemExit) as stop:
            run(*args, *flags)
        assert stop.value.code == code
    assert "a.jsonl, line 401: 'text' is null, not text" in capsys.readouterr().err
