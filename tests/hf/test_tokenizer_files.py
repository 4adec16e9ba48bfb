"""The files for transformers' AutoTokenizer: what they say, and what it makes of them."""

import json

import pytest
import tokenizers

from relora_jax.hf import probes, sentencepiece_json, tokenizer_files
from relora_jax.tokenizer import tokenizer
from tests.support.documents import hard_documents, texts
from tests.support.tokenizers import CODE, GEMMA, LLAMA, json_file, tied, trained
from tests.support.tokenizers import T5_PATH as T5

LINES = [line for text in texts(60) for line in text.split("\n\n")]
LENGTH = 512
SAME = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": LENGTH,
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}
SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>"}


def foreign(path, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(trained(CODE, kind="bpe", **settings).SerializeToString())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def made(folder):
    """Tokenizers by name."""
    named = {
        kind: tokenizer.train(LINES, kind=kind, vocab_size=pieces, path=folder / f"{kind}.model")
        for kind, pieces in (("bpe", 420), ("unigram", 310))
    }
    llama = foreign(folder / "llama.model", **LLAMA)
    return {
        **named,
        "llama": tokenizer.load(llama),
        "llama with bos": tokenizer.load(llama, bos_id=1),
        "symbols": tokenizer.load(foreign(folder / "symbols.model", **GEMMA)),
        "symbols and prefix": tokenizer.load(
            foreign(folder / "prefix.model", **{**GEMMA, "add_dummy_prefix": True})
        ),
        "given ids": tokenizer.load(named["bpe"].path, eos_id=400, pad_id=3),
        "json": tokenizer.load(json_file(folder / "json")),
        "unigram json": tokenizer.load(json_file(folder / "unigram", kind="unigram")),
    }


def said(files, name=tokenizer_files.CONFIG):
    return json.loads(files[name])


def piece(tokenizer, i):
    return tokenizer.model._model.id_to_piece(i)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("bpe", {**SPECIAL, "unk_token": "<unk>"}),
        ("unigram", {**SPECIAL, "unk_token": "<unk>"}),
        ("llama", {"eos_token": "</s>", "unk_token": "<unk>"}),
        ("llama with bos", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
        ("json", SPECIAL),
    ],
)
def test_config_names_the_tokens_that_the_run_has(made, name, tokens):
    files = tokenizer_files.files(made[name], length=LENGTH)
    assert said(files) == {**SAME, **tokens}
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"} < set(tokenizer_files.FILES)


def test_given_ids_win_and_a_piece_of_texts_is_not_looked_for_in_texts(made):
    files = tokenizer_files.files(made["given ids"], length=LENGTH)
    word = piece(made["bpe"], 400)
    tokens = {"eos_token": word, "pad_token": "\n", "unk_token": "<unk>"}
    assert said(files) == {**SAME, **tokens, "split_special_tokens": True}
    raw = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    raw.encode_special_tokens = True
    text = f"people{word.replace(sentencepiece_json.SPACE, ' ')}\n"
    (ids,) = made["given ids"].encode_documents([text])
    assert raw.encode(text).ids == ids.tolist() and 400 in ids


@pytest.mark.parametrize("name", ["bpe", "unigram", "llama", "symbols"])
def test_file_is_the_converted_model(made, name):
    files = tokenizer_files.files(made[name], length=LENGTH)
    raw = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert raw.get_vocab_size() == made[name].vocab_size
    for ids, other in zip(made[name].encode_documents(LINES), raw.encode_batch(LINES), strict=True):
        assert ids.tolist() == other.ids
        assert raw.decode(other.ids) == made[name].decode(ids)


def test_tokenizer_json_goes_out_as_it_is_with_what_lies_beside_it(tmp_path):
    path = json_file(tmp_path)
    settings = json.loads(path.read_text())
    settings["model"]["dropout"] = None
    path.write_text(json.dumps(settings))
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False}
    told = {
        "eos_token": eos,
        "bos_token": "<s>",
        "auto_map": {"AutoTokenizer": ["own.Code", None]},
        "kept": 1,
    }
    told |= {"tokenizer_class": "OwnTokenizer", "model_max_length": 9, "clean_up_tokenization_spaces": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "kept": 2}))
    beside = {"added_tokens.json": b'{"zebra": 329}', "chat_template.jinja": b"{{ messages }}"}
    for name, content in beside.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.json").write_text("{}")
    files = tokenizer_files.files(tokenizer.load(path), length=LENGTH)
    assert set(files) == set(tokenizer_files.FILES) - {"tokenizer.model"}
    assert files["tokenizer.json"] == path.read_bytes()
    assert (files["chat_template.jinja"], files["added_tokens.json"]) == (
        b"{{ messages }}",
        b'{"zebra": 329}',
    )
    tokens = {"eos_token": eos, "bos_token": "<s>", "pad_token": "<pad>"}
    assert said(files) == {**SAME, **tokens, "kept": 1}
    assert said(files, "special_tokens_map.json") == {"eos_token": "</s>", "pad_token": "<pad>", "kept": 2}
    given = tokenizer_files.files(tokenizer.load(path, eos_id=2), length=LENGTH)
    assert said(given)["eos_token"] == said(given, "special_tokens_map.json")["eos_token"] == "<s>"


def test_files_beside_a_tokenizer_of_another_name_are_anothers(tmp_path):
    path = json_file(tmp_path, name="named.json", tokenizer_config={"kept": 1}, special_tokens_map={})
    files = tokenizer_files.files(tokenizer.load(path), length=LENGTH)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"} and "kept" not in said(files)


def test_dropout_is_left_out_of_a_tokenizer_json(made):
    files = tokenizer_files.files(made["json"], length=LENGTH)
    expected = json.loads(made["json"].path.read_text())
    assert expected["model"]["dropout"] == 0.5
    expected["model"]["dropout"] = None
    assert said(files, "tokenizer.json") == expected


def test_ordinary_token_of_a_tokenizer_json_is_not_looked_for_in_texts(made):
    eos = tokenizer.load(made["json"].path, eos_id=40)
    assert said(tokenizer_files.files(eos, length=LENGTH))["split_special_tokens"] is True


def test_id_without_a_token_is_named(tmp_path):
    path = json_file(tmp_path)
    settings = json.loads(path.read_text())
    settings["model"]["vocab"]["far"] = 500
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"\.json has no token 400, which data names as its eos_token$"):
        tokenizer_files.files(tokenizer.load(path, eos_id=400), length=LENGTH)


def test_file_that_is_no_longer_the_same_is_refused(tmp_path):
    path = foreign(tmp_path / "m.model", **LLAMA)
    loaded = tokenizer.load(path)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"m\.model has been changed meanwhile"):
        tokenizer_files.files(loaded, length=LENGTH)
    path.unlink()
    with pytest.raises(ValueError, match=r"m\.model cannot be read: No such file"):
        tokenizer_files.files(loaded, length=LENGTH)


def test_setting_without_a_counterpart_is_named_with_the_file(tmp_path):
    path = foreign(tmp_path / "m.model", **{**GEMMA, "remove_extra_whitespaces": True})
    with pytest.raises(ValueError, match=r"m\.model cannot become a tokenizer\.json: its user-defined"):
        tokenizer_files.files(tokenizer.load(path), length=LENGTH)


def test_pieces_of_one_score_that_texts_tell_apart_are_refused(tmp_path):
    apart = tokenizer_files.files(tied(tmp_path / "apart.model", "ab", "cd"), length=LENGTH)
    assert "tokenizer.json" in apart
    with pytest.raises(tokenizer_files.NoFastFormError, match=r"'abc' would have the ids .*, not \["):
        tokenizer_files.files(tied(tmp_path / "meet.model", "bc", "ab"), length=LENGTH)


def test_an_export_says_in_how_many_texts_a_normalization_rule_is_applied_otherwise(tmp_path, monkeypatch):
    model = trained(CODE, kind="unigram", vocab_size=160, character_coverage=0.98)  # the default rule
    (tmp_path / "rule.model").write_bytes(model.SerializeToString())
    loaded = tokenizer.load(tmp_path / "rule.model")
    assert "tokenizer.json" in tokenizer_files.files(loaded, length=LENGTH)
    hard = ["plain", "e\u0301", "e\u0301\u0301", "\u2581\u0301"]
    monkeypatch.setattr(probes, "texts", lambda model: hard)
    ours, theirs = loaded.encode_documents(hard), sentencepiece_json.convert(model).encode_batch(hard)
    differing = sum(one.tolist() != other.ids for one, other in zip(ours, theirs, strict=True))
    assert 0 < differing < 4
    assert tokenizer_files.note(loaded).startswith(f"{differing} of 4 hard texts have other ids")
    monkeypatch.setattr(probes, "texts", lambda model: hard[:1])
    assert tokenizer_files.note(loaded) == ""


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_other_ids_than_ours_are_never_written(made, name, monkeypatch):
    right = sentencepiece_json.convert

    def wrong(model, **chosen):
        made = right(model, **chosen)
        made.normalizer = tokenizers.normalizers.Lowercase()
        return made

    monkeypatch.setattr(sentencepiece_json, "convert", wrong)
    with pytest.raises(ValueError, match=r"would have the ids \[.*\], not \["):
        tokenizer_files.files(made[name], length=LENGTH)


def with_transformers(test):
    """Slow, where transformers is installed; what it warns of itself is its own affair."""
    for mark in (
        pytest.mark.filterwarnings("ignore::FutureWarning"),
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),
        pytest.mark.slow,
        pytest.mark.hf,
    ):
        test = mark(test)
    return test


@pytest.fixture
def auto(monkeypatch, tmp_path):
    """AutoTokenizer of files beside a LLaMA's config.json, without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="needs the extra hf-test")
    transformers.logging.set_verbosity_error()

    def load(files, **settings):
        for name, content in files.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "config.json").write_text(
            '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
        )
        return transformers.AutoTokenizer.from_pretrained(tmp_path, **settings)

    return load


def check(ours, loaded, documents, most=0):
    """Ids and texts of all documents are equal, but for a unigram model's ties and `most` others."""
    odd = []
    encoded = [ids.tolist() for ids in ours.encode_documents(documents)]
    found = loaded(documents, add_special_tokens=False)["input_ids"]
    for text, one, two in zip(documents, encoded, found, strict=True):
        if one != two:
            model = sentencepiece_json.parse(ours.path.read_bytes())
            odd += [] if sentencepiece_json.is_tie(model, one, two) else [text]
        elif ours.model.decode(one) == text:
            assert loaded.decode([*one, ours.eos], skip_special_tokens=True) == ours.decode(one)
    assert len(odd) <= most, odd[:3]


NAMES = ["bpe", "unigram", "llama", "llama with bos", "symbols", "symbols and prefix", "given ids"]
NAMES += ["json", "unigram json"]


@with_transformers
@pytest.mark.parametrize("name", NAMES)
def test_auto_tokenizer_gives_our_ids_on_a_thousand_documents(made, auto, name):
    ours, files = made[name], tokenizer_files.files(made[name], length=LENGTH)
    documents = hard_documents([" people", " the", "zebra"])
    loaded = auto(files)
    written = [token.content for token in loaded.added_tokens_decoder.values() if token.special]
    plain = [text for text in documents if not any(token in text for token in written)]
    assert len(documents) == 1000 and len(plain) > (100 if name == "given ids" else 700)
    check(ours, loaded, documents if name == "given ids" else plain)
    assert loaded.is_fast and loaded.model_max_length == LENGTH and loaded.eos_token_id == ours.eos
    assert loaded.pad_token_id == (ours.pad if "pad_token" in said(files) else None)
    asked = auto(files, split_special_tokens=True)
    check(ours, asked, plain if name == "unigram json" else documents)


@with_transformers
@pytest.mark.skipif(not T5.is_file(), reason=f"{T5} is not there: python scripts/get_t5_tokenizer.py")
def test_auto_tokenizer_gives_t5s_ids_but_for_few_of_the_hardest_documents(auto):
    ours = tokenizer.load(T5)
    files = tokenizer_files.files(ours, length=LENGTH)
    documents = hard_documents([" house", "ing", "<extra_id_0>"])  # a thousand
    check(ours, auto(files, split_special_tokens=True), documents, most=5)


@with_transformers
@pytest.mark.parametrize(
    ("name", "first", "last"), [("bpe", [], []), ("llama with bos", [1], []), ("json", [2], [3])]
)
def test_auto_tokenizer_puts_around_a_text_what_the_run_or_the_file_says(made, auto, name, first, last):
    loaded = auto(tokenizer_files.files(made[name], length=LENGTH))
    (ids,) = made[name].encode_documents(["the union of states"])
    found = loaded("the union of states")
    assert found["input_ids"] == [*first, *ids.tolist(), *last]  # neither truncated nor padded
    assert set(found) == {"input_ids", "attention_mask"}


@with_transformers
def test_auto_tokenizer_reads_a_written_special_token_as_the_token(made, auto):
    loaded = auto(tokenizer_files.files(made["bpe"], length=LENGTH))
    assert loaded("of</s>")["input_ids"][-1] == made["bpe"].eos
