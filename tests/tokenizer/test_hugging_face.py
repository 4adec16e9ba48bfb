"""Hugging Face's tokenizer.json files, written here with the tokenizers library."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from relora_jax.errors import UserError
from relora_jax.tokenizer import sidecars, tokenizer
from relora_jax.tokenizer.hugging_face import prefix
from tests.support.documents import texts
from tests.support.tokenizers import SPECIAL, json_file


def test_prefix_is_what_the_file_adds_before_a_text(tmp_path):
    path = json_file(tmp_path)
    settings = json.loads(path.read_bytes())
    bos, template = settings["model"]["vocab"]["<s>"], settings["post_processor"]
    single = template["single"]
    for first, expected in ((single, [bos]), ([single[0], *single], [bos, bos]), (single[1:], [])):
        template["single"] = first  # </s> comes after a text
        assert prefix(path, json.dumps(settings).encode()) == expected
    settings["post_processor"] = {"type": "Nothing"}
    with pytest.raises(ValueError, match=r"is not a valid tokenizer\.json"):
        prefix(path, json.dumps(settings).encode())
    settings["post_processor"] = None
    assert prefix(path, json.dumps(settings).encode()) == []


EOS_TEXT = "the people </s> of </s>the union"


def written(path, model, special=("</s>",), **config):
    """A tokenizer.json of a model that splits at spaces, with tokens added as special, and its config."""
    built = tokenizers.Tokenizer(model)
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.add_special_tokens([*special])
    path.mkdir(exist_ok=True)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    built.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


LETTERS = sorted(set(EOS_TEXT) - {" "})
WORDS = {word: i for i, word in enumerate(["<unk>", "</s>", "the", "people", *LETTERS])}
PARTS = WORDS | {f"##{letter}": len(WORDS) + i for i, letter in enumerate(LETTERS)}
MERGED = {**WORDS, "</": 90, "s>": 91}
MERGES = [("<", "/"), ("s", ">"), ("</", "s>")]
MODELS = {
    "WordLevel": lambda: models.WordLevel(WORDS, unk_token="<unk>"),
    "WordPiece": lambda: models.WordPiece(PARTS, unk_token="<unk>"),
    "BPE": lambda: models.BPE(WORDS, [], unk_token="<unk>", ignore_merges=True),
    "BPE that merges eos": lambda: models.BPE(MERGED, MERGES, unk_token="<unk>"),
    "Unigram": lambda: models.Unigram([(word, -1.0) for word in WORDS], 0),
}


@pytest.mark.parametrize("special", [("</s>",), ("</s>", "<unk>"), ()])
@pytest.mark.parametrize("kind", MODELS)
def test_text_never_contains_the_id_of_eos(kind, special, tmp_path):
    path = written(tmp_path, MODELS[kind](), special, eos_token="</s>")
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.encode_special_tokens = True
    assert raw.token_to_id("</s>") in raw.encode(EOS_TEXT).ids  # as the library reads the file
    loaded = tokenizer.load(path)
    (ids,) = loaded.encode_documents([EOS_TEXT])
    plain = "the people of the union"
    assert loaded.eos == raw.token_to_id("</s>") not in ids
    assert loaded.encode_documents([plain])[0].tolist() == raw.encode(plain).ids
    assert loaded.decode([*loaded.encode_documents(["the"])[0], loaded.eos]).replace(" ", "") == "the"
    spelled = kind != "WordLevel"
    assert (0 in ids) != spelled
    notes = tokenizer.control_in_text(loaded)
    assert [note.partition(".json: ")[2] for note in notes] == (
        [] if spelled else ["'</s>', the eos, cannot be spelled as text: in a text it is lost"]
    )


@pytest.mark.parametrize("ids", [{}, {"eos_id": 7}, {"eos_id": 0, "pad_id": 7}, {"eos_id": 0, "bos_id": 7}])
def test_added_token_that_is_not_special_is_plain_text_where_it_ends_or_pads(ids, tmp_path):
    path = written(tmp_path, models.BPE(dict(zip("<end>a", range(6), strict=True)), []), special=("x",))
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.add_tokens(["<end>"])
    raw.save(str(path))
    if not ids:
        path.with_name("tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert raw.encode("a<end>").ids == [5, 7]
    assert tokenizer.load(path, **ids).encode_documents(["a<end>"])[0].tolist() == [5, 0, 1, 2, 3, 4]


def test_text_never_contains_the_id_of_eos_whatever_it_contains(tmp_path):
    """Not even the name under which the piece of eos is hidden from texts."""
    for kind in MODELS:
        loaded = tokenizer.load(written(tmp_path / kind, MODELS[kind](), eos_token="</s>"))
        assert loaded.eos not in loaded.encode_documents(["the \0</s>\0 people"])[0], kind
        assert loaded.model.piece(loaded.eos) == "</s>"


def test_eos_that_a_text_spells_in_bytes_is_reported(tmp_path):
    path = json_file(tmp_path, special=SPECIAL, tokenizer_config={"eos_token": "\u010a"})  # a line end
    loaded = tokenizer.load(path)
    assert loaded.eos in loaded.encode_documents(["a\nb"])[0]
    (note,) = tokenizer.control_in_text(loaded)
    assert note.endswith(rf"'\n' in a text has the id of eos, {loaded.eos}, in the middle of a document")


@pytest.mark.parametrize("splitter", [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
def test_eos_that_a_unigram_model_loses_is_reported(splitter, tmp_path):
    pieces = [(piece, -1.0) for piece in ("<unk>", "</s>", "\u2581", "a", "b")]
    path = written(tmp_path, models.Unigram(pieces, 0))
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.pre_tokenizer, raw.decoder = splitter, decoders.Metaspace()
    raw.save(str(path))
    (note,) = tokenizer.control_in_text(tokenizer.load(path))
    assert note.endswith("'</s>', the eos, cannot be spelled as text: in a text it is lost")


def test_rows_with_one_key_have_the_same_ids(tmp_path):
    """Which names are hidden from texts depends on files that the digest of tokenizer.json does not cover."""
    raw = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    raw.add_special_tokens(["<s>"])
    raw.add_tokens(["<end>"])
    sources = []
    for number, config in enumerate([{}, {"eos_token": "ab"}, {"eos_token": "<end>"}, {"eos_token": "b"}]):
        (tmp_path / str(number)).mkdir()
        raw.save(str(tmp_path / str(number) / "tokenizer.json"))
        (tmp_path / str(number) / "tokenizer_config.json").write_text(json.dumps(config))
        sources += [tokenizer.load(tmp_path / str(number) / "tokenizer.json", eos_id=i) for i in (1, 2, 4)]
    ids_of = {}
    for source in sources:
        ids = [each.tolist() for each in source.encode_documents(["ab", "a<end>", "b"])]
        assert ids_of.setdefault(json.dumps(source.key), ids) == ids
    assert len(ids_of) > 3
    assert tokenizer.load(tmp_path / "0" / "tokenizer.json", eos_id=3).key.keys() == {
        "tokenizer",
        "eos",
        "pad",
    }


def test_ordinary_piece_as_eos_is_reported(tmp_path):
    path = written(tmp_path, models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    for eos, text in ((0, "a"), (2, "ab")):
        (note,) = tokenizer.control_in_text(tokenizer.load(path, eos_id=eos))
        assert note.endswith(f"{text!r} in a text has the id of eos, {eos}, in the middle of a document")
    assert tokenizer.control_in_text(tokenizer.load(json_file(tmp_path / "json"))) == []
    # the character of a BPE model stays: texts would lose it
    path = written(tmp_path, models.BPE({"a": 0, "b": 1}, []), special=["b"])
    assert tokenizer.load(path, eos_id=1).encode_documents(["aba"])[0].tolist() == [0, 1, 0]
    assert len(tokenizer.control_in_text(tokenizer.load(path, eos_id=1))) == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_text_round_trips_untruncated_without_special_ids(kind, tmp_path):
    loaded = tokenizer.load(json_file(tmp_path, kind=kind))
    documents = [" ".join(texts(9)[:3]), "one </s> two <pad> <s>", "", "a zebra"]
    encoded = loaded.encode_documents(documents)
    assert [ids.tolist() for ids in encoded] == [loaded.encode_documents([t])[0].tolist() for t in documents]
    assert len(encoded[0]) > 20 and len(encoded[2]) == 0  # neither truncated nor padded
    assert not {1, 2, 3} & {i for ids in encoded for i in ids.tolist()}
    if kind == "bpe":
        assert [loaded.decode(ids) for ids in encoded] == documents
    assert loaded.decode([loaded.pad, *encoded[3], loaded.eos]) == "a zebra"


def test_added_tokens_count_as_pieces(tmp_path):
    path = json_file(tmp_path)
    loaded = tokenizer.load(path)
    zebra = next(t["id"] for t in json.loads(path.read_text())["added_tokens"] if t["content"] == "zebra")
    assert loaded.vocab_size == zebra + 1
    assert loaded.encode_documents(["zebra"])[0].tolist() == [zebra]


@pytest.mark.parametrize(
    ("special", "sidecars", "eos", "pad"),
    [
        (SPECIAL, {}, "</s>", "<pad>"),
        (["<|endoftext|>"], {}, "<|endoftext|>", "<|endoftext|>"),
        (["x", "<|end_of_text|>"], {}, "<|end_of_text|>", "<|end_of_text|>"),
        (["x", "<|eot_id|>"], {}, "<|eot_id|>", "<|eot_id|>"),
        (["[PAD]", "<eos>"], {}, "<eos>", "[PAD]"),
        (SPECIAL, {"tokenizer_config": {"eos_token": "<s>", "pad_token": None}}, "<s>", "<pad>"),
        (SPECIAL, {"tokenizer_config": {"eos_token": {"content": "<s>", "lstrip": False}}}, "<s>", "<pad>"),
        (SPECIAL, {"special_tokens_map": {"eos_token": {"content": "zebra"}}}, "zebra", "<pad>"),
        (SPECIAL, {"generation_config": {"eos_token_id": [2, 3], "pad_token_id": 0}}, "<s>", "<unk>"),
        (SPECIAL, {"config": {"eos_token_id": 2, "pad_token_id": -1}}, "<s>", "<pad>"),
        (
            SPECIAL,
            {"config": {"eos_token_id": 2}, "tokenizer_config": {"eos_token": "<unk>"}},
            "<unk>",
            "<pad>",
        ),
        (SPECIAL, {"config": {"eos_token_id": 9999}}, "</s>", "<pad>"),
        (
            SPECIAL,
            {"tokenizer_config": {"eos_token": "<gone>"}, "config": {"eos_token_id": []}},
            "</s>",
            "<pad>",
        ),
    ],
)
def test_special_ids_come_from_sidecar_files_or_usual_names(special, sidecars, eos, pad, tmp_path):
    path = json_file(tmp_path, special=special, **sidecars)
    loaded, raw = tokenizer.load(path), tokenizers.Tokenizer.from_file(str(path))
    assert (raw.id_to_token(loaded.eos), raw.id_to_token(loaded.pad)) == (eos, pad)


def test_sidecar_files_are_ignored_for_other_file_names(tmp_path):
    path = json_file(tmp_path, name="mine.json", config={"eos_token_id": 2})
    assert tokenizer.load(path).eos == 3


def test_tokenizer_without_eos_names_the_setting(tmp_path):
    path = json_file(tmp_path, special=["<unk>", "[SEP]"])
    with pytest.raises(ValueError, match=r"tokenizer\.json has no eos .*: set data\.eos_id"):
        tokenizer.load(path)
    assert tokenizer.load(path, eos_id=1).eos == 1


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_ids_are_those_of_the_library(kind, tmp_path):
    path = json_file(tmp_path, kind=kind)
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.no_truncation()
    raw.no_padding()
    if kind == "bpe":
        raw.model.dropout = None
    expected = [raw.encode(t, add_special_tokens=False).ids for t in texts(20)]
    assert [ids.tolist() for ids in tokenizer.load(path).encode_documents(texts(20))] == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95garbage",
        b"{",
        b"[]",
        b"3",
        b"{}",
        b'{"model": 3}',
        b'{"model": {"type": "BPE", "vocab": [], "merges": []}}',
        b"[" * 100_000,
        b'{"model":' * 100_000,
    ],
)
def test_invalid_tokenizer_file_is_named_in_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"tokenizer\.json is not a valid tokenizer\.json \(.*\): use another"
    ) as raised:
        tokenizer.load(path)
    assert "\n" not in str(raised.value)


def test_ids_that_would_fill_memory_are_refused(tmp_path):
    path = json_file(tmp_path)
    settings = json.loads(path.read_text())
    settings["model"]["vocab"]["far"] = 4_000_000_000
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"is not a valid tokenizer .its highest id is 4000000000"):
        tokenizer.load(path)


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_damaged_sidecar_file_is_named(content, tmp_path):
    path = json_file(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"/config\.json, which defines a tokenizer's special tokens"
    ) as raised:
        tokenizer.load(path)
    assert "\n" not in str(raised.value)


INVALID = {
    "tokenizer_config": [
        {"bos_token": 5},
        {"bos_token": True},
        {"eos_token": ["a"]},
        {"pad_token": {"content": ["a"]}},
        {"image_token": {"text": "a"}},
        {"added_tokens_decoder": ["a"]},
        {"added_tokens_decoder": {"330": {}}},
        {"added_tokens_decoder": {"330": "<x>"}},
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"330": {"content": "<x>", "lstrip": 1}}},
        {"additional_special_tokens": [1]},
    ],
    "special_tokens_map": [{"pad_token": 5}],
    "added_tokens": [{"<x>": "330"}, {"<x>": None}],
}
INVALID_FILES = [(name, settings) for name, each in INVALID.items() for settings in each]


@pytest.mark.parametrize(("name", "settings"), INVALID_FILES)
def test_tokens_in_another_form_are_named_with_their_file(name, settings, tmp_path):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(settings))
    key = next(iter(settings))
    with pytest.raises(UserError, match=rf"/{name}\.json defines .*, and '?{key}'? in it is not valid: corr"):
        sidecars.read(path)


def test_tokens_in_the_form_of_transformers_are_read(tmp_path):
    token = {"content": "<x>", "lstrip": False}
    settings = {"bos_token": None, "eos_token": "a", "pad_token": token, "add_bos_token": True}
    settings |= {"added_tokens_decoder": {"3": token}, "additional_special_tokens": ["a", token]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert sidecars.read(tmp_path / "tokenizer_config.json") == settings


def test_fork_after_encoding_prints_nothing(tmp_path):
    path = json_file(tmp_path)
    code = (
        "import os, sys; from relora_jax.tokenizer import tokenizer;"
        "tokenizer.load(sys.argv[1]).encode_documents(['a'] * 99); child = os.fork();"
        "child and os.waitpid(child, 0)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")


def test_spawned_workers_encode_the_same(tmp_path):
    loaded = tokenizer.load(json_file(tmp_path))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (in_worker,) = pool.map(loaded.encode_documents, [texts(3)])
    assert [ids.tolist() for ids in in_worker] == [ids.tolist() for ids in loaded.encode_documents(texts(3))]
