"""The files for transformers' AutoTokenizer: their content, and the tokenizer that it loads from them."""

import fnmatch
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
LLAMA_CPP = {"add_bos_token": False, "add_prefix_space": False}
SPECIAL = {"eos_token": "</s>", "pad_token": "<pad>"}


THREE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def foreign(path, **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(trained(CODE, kind="bpe", **settings).SerializeToString())
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def by_name(folder):
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
        "set ids": tokenizer.load(named["bpe"].path, eos_id=400, pad_id=3),
        "json": tokenizer.load(json_file(folder / "json")),
        "unigram json": tokenizer.load(json_file(folder / "unigram", kind="unigram")),
    }


def read_json(files, name=tokenizer_files.CONFIG):
    return json.loads(files[name])


def piece(tokenizer, i):
    return tokenizer.model._model.id_to_piece(i)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("bpe", {**SPECIAL, "unk_token": "<unk>", **LLAMA_CPP}),
        ("unigram", {**SPECIAL, "unk_token": "<unk>", **LLAMA_CPP}),
        ("llama", {**THREE, "add_bos_token": False, "add_prefix_space": True}),
        ("llama with bos", {**THREE, "add_bos_token": True, "add_prefix_space": True}),
        ("json", SPECIAL),
    ],
)
def test_config_names_the_runs_special_tokens(by_name, name, tokens):
    files = tokenizer_files.files(by_name[name], length=LENGTH)
    assert read_json(files) == {**SAME, **tokens}
    beside = {"unigram": {"spiece.model"}, "json": set()}.get(name, {"tokenizer.model"})
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"} | beside < set(tokenizer_files.FILES)
    assert all(files[each] == by_name[name].path.read_bytes() for each in beside)


def test_set_ids_win_and_ordinary_pieces_are_not_parsed_as_special(by_name):
    files = tokenizer_files.files(by_name["set ids"], length=LENGTH)
    word = piece(by_name["bpe"], 400)
    tokens = {"eos_token": word, "pad_token": "\n", "unk_token": "<unk>", **LLAMA_CPP}
    assert read_json(files) == {**SAME, **tokens, "split_special_tokens": True}
    raw = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    raw.encode_special_tokens = True
    text = f"people{word.replace(sentencepiece_json.SPACE, ' ')}\n"
    (ids,) = by_name["set ids"].encode_documents([text])
    assert raw.encode(text).ids == ids.tolist() and 400 in ids


@pytest.mark.parametrize("name", ["bpe", "unigram", "llama", "symbols"])
def test_file_is_the_converted_model(by_name, name):
    files = tokenizer_files.files(by_name[name], length=LENGTH)
    raw = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    assert raw.get_vocab_size() == by_name[name].vocab_size
    for ids, other in zip(by_name[name].encode_documents(LINES), raw.encode_batch(LINES), strict=True):
        assert ids.tolist() == other.ids
        assert raw.decode(other.ids) == by_name[name].decode(ids)


def test_tokenizer_json_is_copied_with_the_files_next_to_it(tmp_path):
    path = json_file(tmp_path)
    settings = json.loads(path.read_text())
    settings["model"]["dropout"] = None
    path.write_text(json.dumps(settings))
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False}
    config = {
        "eos_token": eos,
        "bos_token": "<s>",
        "auto_map": {"AutoTokenizer": ["own.Code", None]},
        "other": 1,
    }
    config |= {"tokenizer_class": "OwnTokenizer", "model_max_length": 9, "clean_up_tokenization_spaces": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "other": 2}))
    copied = {
        "added_tokens.json": b'{"zebra": 329}',
        "chat_template.jinja": b"{{ messages }}",
        "chat_template.json": b"{}",
        "additional_chat_templates/tool.jinja": b"{{ tools }}",
        "tokenizer.model": b"as it is",
    }
    (tmp_path / "additional_chat_templates").mkdir()
    for name, content in copied.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "vocab.json").write_text("{}")
    files = tokenizer_files.files(tokenizer.load(path), length=LENGTH)
    assert set(files) == {*copied, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert all(any(fnmatch.fnmatchcase(name, kind) for kind in tokenizer_files.FILES) for name in files)
    assert files["tokenizer.json"] == path.read_bytes()
    assert {name: files[name] for name in copied} == copied
    tokens = {"eos_token": eos, "bos_token": "<s>", "pad_token": "<pad>"}
    assert read_json(files) == {**SAME, **tokens, "other": 1}
    assert read_json(files, "special_tokens_map.json") == {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "other": 2,
    }
    changed = tokenizer_files.files(tokenizer.load(path, eos_id=2), length=LENGTH)
    assert (
        read_json(changed)["eos_token"] == read_json(changed, "special_tokens_map.json")["eos_token"] == "<s>"
    )


def test_files_next_to_a_tokenizer_of_another_name_are_ignored(tmp_path):
    path = json_file(tmp_path, name="named.json", tokenizer_config={"other": 1}, special_tokens_map={})
    files = tokenizer_files.files(tokenizer.load(path), length=LENGTH)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"} and "other" not in read_json(files)


def test_dropout_is_removed_from_a_tokenizer_json(by_name):
    files = tokenizer_files.files(by_name["json"], length=LENGTH)
    expected = json.loads(by_name["json"].path.read_text())
    assert expected["model"]["dropout"] == 0.5
    expected["model"]["dropout"] = None
    assert read_json(files, "tokenizer.json") == expected


def test_ordinary_token_as_eos_is_not_parsed_in_texts(by_name):
    eos = tokenizer.load(by_name["json"].path, eos_id=40)
    assert read_json(tokenizer_files.files(eos, length=LENGTH))["split_special_tokens"] is True


def test_id_without_a_token_is_reported(tmp_path):
    path = json_file(tmp_path)
    settings = json.loads(path.read_text())
    settings["model"]["vocab"]["far"] = 500
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"\.json has no token 400, which the run uses as eos_token$"):
        tokenizer_files.files(tokenizer.load(path, eos_id=400), length=LENGTH)


def test_changed_tokenizer_file_is_rejected(tmp_path):
    path = foreign(tmp_path / "m.model", **LLAMA)
    loaded = tokenizer.load(path)
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ValueError, match=r"m\.model changed after it was loaded"):
        tokenizer_files.files(loaded, length=LENGTH)
    path.unlink()
    with pytest.raises(ValueError, match=r"m\.model cannot be read: No such file"):
        tokenizer_files.files(loaded, length=LENGTH)


def test_unsupported_setting_is_reported_with_the_file(tmp_path):
    path = foreign(tmp_path / "m.model", **{**GEMMA, "remove_extra_whitespaces": True})
    with pytest.raises(ValueError, match=r"m\.model cannot be converted to tokenizer\.json: user-defined"):
        tokenizer_files.files(tokenizer.load(path), length=LENGTH)


def test_tied_pieces_with_different_ids_are_rejected(tmp_path):
    apart = tokenizer_files.files(tied(tmp_path / "apart.model", "ab", "cd"), length=LENGTH)
    assert "tokenizer.json" in apart
    with pytest.raises(tokenizer_files.NoFastFormError, match=r"'abc' would have the ids .*, not \["):
        tokenizer_files.files(tied(tmp_path / "meet.model", "bc", "ab"), length=LENGTH)


def test_note_counts_texts_affected_by_a_normalization_rule(tmp_path, monkeypatch):
    model = trained(CODE, kind="unigram", vocab_size=160, character_coverage=0.98)  # the default rule
    (tmp_path / "rule.model").write_bytes(model.SerializeToString())
    loaded = tokenizer.load(tmp_path / "rule.model")
    assert "tokenizer.json" in tokenizer_files.files(loaded, length=LENGTH)
    hard = ["plain", "e\u0301", "e\u0301\u0301", "\u2581\u0301"]
    monkeypatch.setattr(probes, "texts", lambda model: hard)
    ours, theirs = loaded.encode_documents(hard), sentencepiece_json.convert(model).encode_batch(hard)
    differing = sum(one.tolist() != other.ids for one, other in zip(ours, theirs, strict=True))
    assert 0 < differing < 4
    assert tokenizer_files.note(loaded).startswith(f"{differing} of 4 hard texts have different ids")
    monkeypatch.setattr(probes, "texts", lambda model: hard[:1])
    assert tokenizer_files.note(loaded) == ""


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_tokenizer_with_different_ids_is_never_written(by_name, name, monkeypatch):
    right = sentencepiece_json.convert

    def wrong(model, **options):
        converted = right(model, **options)
        converted.normalizer = tokenizers.normalizers.Lowercase()
        return converted

    monkeypatch.setattr(sentencepiece_json, "convert", wrong)
    with pytest.raises(ValueError, match=r"would have the ids \[.*\], not \["):
        tokenizer_files.files(by_name[name], length=LENGTH)


def with_transformers(test):
    """A slow test that needs transformers and ignores its deprecation warnings."""
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
    """Loads an AutoTokenizer, offline, from files next to a LLaMA's config.json."""
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
    """Checks that ids and texts of all documents are equal, except for ties and `most` others."""
    odd = []
    encoded = [ids.tolist() for ids in ours.encode_documents(documents)]
    actual = loaded(documents, add_special_tokens=False)["input_ids"]
    for text, one, two in zip(documents, encoded, actual, strict=True):
        if one != two:
            model = sentencepiece_json.parse(ours.path.read_bytes())
            odd += [] if sentencepiece_json.is_tie(model, one, two) else [text]
        elif ours.model.decode(one) == text:
            assert loaded.decode([*one, ours.eos], skip_special_tokens=True) == ours.decode(one)
    assert len(odd) <= most, odd[:3]


NAMES = ["bpe", "unigram", "llama", "llama with bos", "symbols", "symbols and prefix", "set ids"]
NAMES += ["json", "unigram json"]


@with_transformers
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.ci] if name in ("bpe", "json") else []) for name in NAMES]
)
def test_auto_tokenizer_gives_our_ids_on_a_thousand_documents(by_name, auto, name):
    ours, files = by_name[name], tokenizer_files.files(by_name[name], length=LENGTH)
    documents = hard_documents([" people", " the", "zebra"])
    loaded = auto(files)
    special_tokens = [token.content for token in loaded.added_tokens_decoder.values() if token.special]
    plain = [text for text in documents if not any(token in text for token in special_tokens)]
    assert len(documents) == 1000 and len(plain) > (100 if name == "set ids" else 700)
    check(ours, loaded, documents if name == "set ids" else plain)
    assert loaded.is_fast and loaded.model_max_length == LENGTH and loaded.eos_token_id == ours.eos
    assert loaded.pad_token_id == (ours.pad if "pad_token" in read_json(files) else None)
    splitting = auto(files, split_special_tokens=True)
    check(ours, splitting, plain if name == "unigram json" else documents)


@with_transformers
@pytest.mark.skipif(not T5.is_file(), reason=f"{T5} is missing: python scripts/get_t5_tokenizer.py")
def test_auto_tokenizer_differs_from_t5_in_few_hard_documents(auto):
    ours = tokenizer.load(T5)
    files = tokenizer_files.files(ours, length=LENGTH)
    documents = hard_documents([" house", "ing", "<extra_id_0>"])  # 1000
    check(ours, auto(files, split_special_tokens=True), documents, most=5)


@with_transformers
@pytest.mark.parametrize(
    ("name", "first", "last"), [("bpe", [], []), ("llama with bos", [1], []), ("json", [2], [3])]
)
def test_auto_tokenizer_adds_the_special_tokens_of_the_run_or_the_file(by_name, auto, name, first, last):
    loaded = auto(tokenizer_files.files(by_name[name], length=LENGTH))
    (ids,) = by_name[name].encode_documents(["the union of states"])
    encoding = loaded("the union of states")
    assert encoding["input_ids"] == [*first, *ids.tolist(), *last]  # neither truncated nor padded
    assert set(encoding) == {"input_ids", "attention_mask"}


@with_transformers
@pytest.mark.parametrize("name", ["bpe", "llama", "llama with bos", "set ids"])
def test_llama_cpp_reads_the_pieces_and_special_tokens(by_name, tmp_path, name):
    vocabularies = pytest.importorskip("gguf.vocab", reason="needs the extra hf-test")
    ours = by_name[name]
    for file, content in tokenizer_files.files(ours, length=LENGTH).items():
        (tmp_path / file).write_bytes(content)
    read = vocabularies.SentencePieceVocab(tmp_path)
    pieces = [piece(ours, i) for i in range(ours.vocab_size)]
    assert [text.decode() for text, *_ in read.all_tokens()] == pieces
    special = vocabularies.SpecialVocab(tmp_path, n_vocab=ours.vocab_size)
    assert special.special_token_ids["eos"] == ours.eos
    assert special.special_token_ids.get("bos") == ours.model.bos
    assert special.add_special_token["bos"] is (ours.bos is not None)


@with_transformers
def test_auto_tokenizer_parses_special_tokens_in_a_text(by_name, auto):
    loaded = auto(tokenizer_files.files(by_name["bpe"], length=LENGTH))
    assert loaded("of</s>")["input_ids"][-1] == by_name["bpe"].eos
