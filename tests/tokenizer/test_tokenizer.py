import io
import json
import os
import pickle
import string

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_jax.hf import sentencepiece_json
from relora_jax.tokenizer import hugging_face, tokenizer
from tests.support.documents import texts
from tests.support.tokenizers import json_file

LINES = [line for text in texts(50) for line in text.split("\n\n")] + [string.printable.replace("\n", "")]
VOCAB_SIZE = 420


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return tokenizer.train(
        LINES, kind="bpe", vocab_size=VOCAB_SIZE, path=tmp_path_factory.mktemp("t") / "t.model"
    )


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/relora_jax/tokenizers"


def model_file(path, **settings):
    """A user's SentencePiece model, with special pieces other than ours."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=110, minloglevel=2, **settings
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return path


PARTS = st.sampled_from([" ", "\n", "\t", "states", "é"]) | st.characters(
    codec="utf-8", exclude_characters="\u2581"
)


@settings(deadline=None, max_examples=150)
@given(text=st.lists(PARTS, max_size=40).map("".join))
def test_encoding_is_lossless(trained, text):
    (ids,) = trained.encode_documents([text])
    assert trained.decode(ids) == text
    assert ids.dtype == np.int32 and ((ids > tokenizer.UNK) & (ids < VOCAB_SIZE)).all()


def test_documents_are_encoded_separately_without_eos(trained):
    documents = [*texts(5), "", "one </s> two", "of"]
    together = trained.encode_documents(documents)
    assert [ids.tolist() for ids in together] == [
        trained.encode_documents([t])[0].tolist() for t in documents
    ]
    assert all(trained.eos not in ids for ids in together)
    assert trained.decode([trained.pad, *together[0], trained.eos]) == documents[0]


def test_special_pieces_have_the_ids_of_t5(trained):
    assert (trained.pad, trained.eos, trained.vocab_size) == (0, 1, VOCAB_SIZE)
    assert [trained.model._model.id_to_piece(i) for i in range(5)] == ["<pad>", "</s>", "<unk>", "\n", "\n\n"]


def test_word_has_the_same_pieces_after_a_lines_end_and_at_the_start(trained):
    alone, after = trained.encode_documents(["people", "states\n\npeople"])
    assert after[-len(alone) :].tolist() == alone.tolist()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_training_is_deterministic_and_silent(kind, tmp_path, capfd):
    first, second = (
        tokenizer.train(iter(LINES), kind=kind, vocab_size=380, path=tmp_path / f"{i}.model") for i in (1, 2)
    )
    assert first.sha256 == second.sha256 == tokenizer.load(tmp_path / "1.model").sha256
    assert first.vocab_size == 380
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["1.model", "2.model"]
    assert capfd.readouterr() == ("", "")


def test_long_lines_are_not_dropped_from_training():
    (line,) = tokenizer._lines(["thestateoftheunion " * 1000])  # SentencePiece's own limit is 4,192 bytes
    assert len(line) < tokenizer.LONGEST_LINE == tokenizer._SETTINGS["max_sentence_length"]
    assert list(tokenizer._lines(["a\n\nb\n", "", "c"])) == ["a", "b", "c"]


def test_training_reads_a_bounded_part_of_a_large_dataset(monkeypatch):
    monkeypatch.setattr(tokenizer, "TRAINING_BYTES", 10)
    assert list(tokenizer._lines(["four"] * 100)) == ["four"] * 3


def test_model_of_a_dataset_is_trained_once_for_each_text(cache):
    read = []

    def documents():
        read.append(1)
        return texts(30)

    first = tokenizer.find("bpe(380)", documents, "toy:1.0.0 train")
    assert tokenizer.find(" bpe( 380 ) ", documents, "toy:1.0.0 train").path == first.path
    assert first.path.parent == cache and len(read) == 1
    others = [
        ("bpe(381)", "toy:1.0.0 train"),
        ("unigram(310)", "toy:1.0.0 train"),
        ("bpe(380)", "toy:1.0.1 train"),
    ]
    paths = {tokenizer.find(spec, documents, key).path for spec, key in others}
    assert len(paths | {first.path}) == 4 and len(read) == 4


def test_model_is_found_by_path_or_by_its_name_in_the_cache(trained, cache, tmp_path):
    def never():
        raise AssertionError("documents are read for an existing model")

    assert tokenizer.find(str(trained.path), never, "k").sha256 == trained.sha256
    cache.mkdir(parents=True)
    (cache / "mine.model").write_bytes(trained.path.read_bytes())
    assert tokenizer.find("mine", never, "k").sha256 == trained.sha256
    with pytest.raises(
        ValueError, match=r"'other' not found, and there is no .*/tokenizers/other\.model or \.json"
    ):
        tokenizer.find("other", never, "k")


def test_directory_stands_for_the_tokenizer_in_it(trained, cache, tmp_path):
    for name in ("spiece.model", "tokenizer.model"):
        (tmp_path / name).write_bytes(trained.path.read_bytes())
        assert tokenizer.find(str(tmp_path), list, "k").path == tmp_path / name
    json_file(tmp_path)
    assert tokenizer.find(str(tmp_path), list, "k").path == tmp_path / "tokenizer.json"
    json_file(cache, name="named.json")
    assert tokenizer.find("named", list, "k").path == cache / "named.json"


@pytest.mark.parametrize("file", ["added_tokens", "tokenizer_config"])
def test_directory_whose_files_add_tokens_to_a_sentencepiece_model_is_refused(trained, file, tmp_path):
    model = tmp_path / "tokenizer.model"
    model.write_bytes(trained.path.read_bytes())

    def add(*tokens):
        decoder = {str(i): {"content": token} for i, token in enumerate(tokens)}
        content = dict.fromkeys(tokens, 9) if file == "added_tokens" else {"added_tokens_decoder": decoder}
        (tmp_path / f"{file}.json").write_text(json.dumps(content))

    add("</s>")
    assert tokenizer.find(str(tmp_path), list, "k").path == model
    add("</s>", "<tool>")
    with pytest.raises(ValueError, match=r"adds '<tool>' to its tokenizer\.model, which is not read: let"):
        tokenizer.find(str(tmp_path), list, "k")
    assert tokenizer.find(str(model), list, "k").path == model


@pytest.mark.parametrize("file", ["special_tokens_map", "tokenizer_config"])
def test_directory_whose_files_name_another_eos_or_pad_than_its_model_is_refused(trained, file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained.path.read_bytes())

    def find(settings, **ids):
        (tmp_path / f"{file}.json").write_text(json.dumps(settings))
        return tokenizer.find(str(tmp_path), list, "k", **ids)

    assert find({"eos_token": "</s>", "pad_token": {"content": "<pad>"}, "bos_token": None}).eos == 1
    for name, other, own in (("eos", "<pad>", "</s>"), ("pad", "</s>", "<pad>")):
        problem = rf"names '{other}' as its {name}, which is '{own}' in its tokenizer\.model .*: let transf"
        for token in (other, {"content": other}):
            with pytest.raises(ValueError, match=problem):
                find({f"{name}_token": token})
        assert getattr(find({f"{name}_token": other}, **{f"{name}_id": 2}), name) == 2


@pytest.mark.parametrize(
    "file",
    [
        "chat_template.jinja",
        "chat_template.json",
        "tokenizer_config.json",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_directory_with_a_chat_template_next_to_a_sentencepiece_model_is_refused(trained, file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained.path.read_bytes())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text('{"chat_template": "{{ messages }}"}')
    with pytest.raises(
        ValueError, match=r"has a chat template, which is not kept .*: let transf.*\.model to do"
    ):
        tokenizer.find(str(tmp_path), list, "k")
    (tmp_path / file).write_text('{"chat_template": null}')
    if file == "tokenizer_config.json":
        assert tokenizer.find(str(tmp_path), list, "k").path == tmp_path / "tokenizer.model"


def test_configured_ids_replace_the_files_own(tmp_path):
    path = model_file(tmp_path / "endless.model", eos_id=-1)
    configured = tokenizer.find(str(path), list, "k", eos_id=7, pad_id=109)
    assert (configured.eos, configured.pad) == (7, 109)
    assert tokenizer.find(str(path), list, "k", eos_id=0).pad == 0  # no pad: eos
    (word,) = configured.encode_documents(["people"])
    assert configured.decode([7, *word, 109, 7]) == "people"
    ours = tokenizer.find("bpe(380)", lambda: texts(30), "key", eos_id=5)
    assert (ours.eos, ours.pad) == (5, 0)


@pytest.mark.parametrize("name", ["tokenizer.json", "t.model"])
def test_unpickled_tokenizer_is_read_again_from_its_path_without_threads(
    trained, name, tmp_path, monkeypatch
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    path = tmp_path / name
    json_file(tmp_path) if name.endswith("json") else path.write_bytes(trained.path.read_bytes())
    first = tokenizer.load(path, eos_id=9, pad_id=8, bos_id=7)
    pickled = pickle.dumps(first)
    second = pickle.loads(pickled)
    assert len(pickled) < 500
    assert (second.eos, second.pad, second.bos) == (9, 8, 7)
    assert (second.vocab_size, second.sha256) == (first.vocab_size, first.sha256)
    for a, b in zip(first.encode_documents(texts(9)), second.encode_documents(texts(9)), strict=True):
        assert (a == b).all()
    if name.endswith("json"):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    else:
        assert (first.model._threads, second.model._threads) == (-1, 1)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"changed while it was in use|is not a"):
        pickle.loads(pickled)


def test_model_without_pad_pads_with_eos(tmp_path):
    llama = tokenizer.load(model_file(tmp_path / "llama.model", pad_id=-1, bos_id=1, eos_id=2, unk_id=0))
    assert (llama.eos, llama.pad, llama.vocab_size) == (2, 2, 110)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe()", "write a number of pieces"),
        ("bpe(many)", "write a number of pieces"),
        ("bpe(0)", "write a number of pieces"),
        ("bpe(-5)", "write a number of pieces"),
        ("bpe(4e3)", "write a number of pieces"),
        ("unigram(5", "write a number of pieces"),
        ("bpe(100)", "smaller than required_chars. 100 vs"),
        ("unigram(100000)", "Please set it to a value <="),
        ("missing.model", "not found"),
        ("garbage", "is not a SentencePiece model"),
        ("empty", "is not a SentencePiece model"),
        ("endless", "has no eos to end documents with: set data.eos_id"),
        ("folder", "'folder' is a directory without tokenizer.json, tokenizer.model, spiece.model"),
    ],
)
def test_bad_tokenizer_is_reported_in_one_line(spec, message, cache, monkeypatch):
    model_file(cache / "endless.model", eos_id=-1)
    (cache / "garbage.model").write_bytes(b"\x07garbage" * 9)
    (cache / "empty.model").write_bytes(b"")
    monkeypatch.chdir(cache)
    (cache / "folder").mkdir()
    with pytest.raises(ValueError) as raised:
        tokenizer.find(spec, lambda: texts(30), "key")
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_prefix_is_what_transformers_adds_before_a_text(tmp_path):
    assert tokenizer.prefix(model_file(tmp_path / "tokenizer.model")) == []  # though it has a bos
    path = json_file(tmp_path / "json")
    assert tokenizer.prefix(path) == hugging_face.prefix(path, path.read_bytes()) == [2]


def test_trailing_control_pieces_count_only_as_special_ids(tmp_path):
    path = model_file(tmp_path / "m.model")
    model = sentencepiece_json.parse(path.read_bytes())
    model.pieces.add(piece="<pad>", type=sentencepiece_json.CONTROL)
    path.write_bytes(model.SerializeToString())
    loaded = tokenizer.load(path, pad_id=2)
    assert (loaded.vocab_size, loaded.highest, tokenizer.load(path, pad_id=110).highest) == (111, 109, 110)
    assert loaded.model.piece(110) == "<pad>" and loaded.encode_documents(["a<pad>"])[0].max() < 110


@pytest.mark.parametrize(("name", "i"), [("eos_id", 110), ("pad_id", 110), ("eos_id", -2), ("bos_id", 110)])
def test_special_id_outside_the_vocabulary_is_named(name, i, tmp_path):
    path = model_file(tmp_path / "m.model")
    with pytest.raises(ValueError, match=rf"data\.{name} {i} is not an id of .*m\.model: .* 0 to 109"):
        tokenizer.load(path, **{name: i})


def test_error_of_the_documents_is_raised_unchanged():
    def documents():
        yield "fine"
        raise ValueError("document 1 is not UTF-8")

    with pytest.raises(ValueError, match=r"^document 1 is not UTF-8$"):
        tokenizer.find("bpe(380)", documents, "key")


def test_training_without_text_is_an_error():
    with pytest.raises(ValueError, match="there is no text"):
        tokenizer.find("bpe(380)", lambda: [], "key")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"none\.model cannot be read"):
        tokenizer.load(tmp_path / "none.model")
