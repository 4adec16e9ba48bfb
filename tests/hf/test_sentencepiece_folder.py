"""A SentencePiece model with transformers' files next to it is what AutoTokenizer makes of them."""

import json

import pytest
import tokenizers

from relora_jax import export
from relora_jax.hf import sentencepiece_folder
from relora_jax.run import record
from relora_jax.tokenizer import tokenizer
from tests.support.commands import import_command
from tests.support.documents import hard_documents
from tests.support.tokenizers import CODE, GEMMA, LLAMA, trained

MISTRAL = {"model_type": "mistral"}
KEEP = {"model_type": "llama"}


def token(content, **flags):
    plain = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word", "special"), False)
    return {"content": content, **plain, **flags}


SPECIAL = {str(i): token(text, special=True) for i, text in enumerate(("<unk>", "<s>", "</s>"))}
DECODER = SPECIAL | {
    "500": token("<tool>", normalized=True),
    "501": token("<|im_end|>", special=True),
    "502": token("<left>", lstrip=True),
    "503": token("<right>", rstrip=True),
    "504": token("word", single_word=True),
    "505": token("<skip>", special=True, rstrip=True),
    "506": token(" sp ", normalized=True),
}
CHAT = {
    "eos_token": "<|im_end|>",
    "pad_token": "<unk>",
    "bos_token": "<s>",
    "add_bos_token": True,
    "added_tokens_decoder": DECODER,
}
MAP = {"pad_token": token("<pad>", lstrip=True), "eos_token": "<end>"}
MAP |= {"additional_special_tokens": ["<tool>"]}
THREE = {"<tool>": 500, "<pad>": 501, "<end>": 502}
TEMPLATES = {
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }} {{ messages }}",
}
OLD = {"tokenizer_class": "LlamaTokenizer"}
# {name: (files, settings of the SentencePiece model)}
FOLDERS = {
    "added tokens": (
        {"added_tokens.json": THREE, "tokenizer_config.json": {**OLD, "pad_token": "<pad>"}},
        {},
    ),
    "chat": ({"tokenizer_config.json": {**OLD, **CHAT, "legacy": False}, **TEMPLATES}, {}),
    "legacy": ({"tokenizer_config.json": {**OLD, **CHAT, "legacy": True}}, {}),
    "template in the config": ({"tokenizer_config.json": {"chat_template": "{{ messages }}"}}, {}),
    "templates alone": (TEMPLATES, {}),
    "special_tokens_map": (
        {"special_tokens_map.json": MAP, "added_tokens.json": THREE, "tokenizer_config.json": OLD},
        {},
    ),
    "no class": ({"special_tokens_map.json": MAP, "added_tokens.json": THREE}, {}),
    "no class, not legacy": (
        {"added_tokens.json": THREE, "tokenizer_config.json": {"legacy": False}},
        {},
    ),
    "further special tokens": (
        {
            "tokenizer_config.json": {
                "tokenizer_class": "LlamaTokenizerFast",
                "additional_special_tokens": ["<a>", "<b c>"],
                "pad_token": "<new>",
                "image_token": "<image>",
                "add_bos_token": True,
                "add_eos_token": True,
            }
        },
        {},
    ),
    "control pieces": (
        {"added_tokens.json": {"<tool>": 500}, "tokenizer_config.json": OLD},
        {"control_symbols": ["[X]", "<name>"]},
    ),
    "no prefix": (
        {
            "added_tokens.json": {"<tool>": 500},
            "tokenizer_config.json": {**OLD, "add_prefix_space": False},
        },
        {"add_dummy_prefix": False},
    ),
    "mistral": ({"config.json": MISTRAL, "tokenizer_config.json": {**OLD, **CHAT}}, {}),
    "mistral, not legacy": (
        {"config.json": MISTRAL, "tokenizer_config.json": {**OLD, **CHAT, "legacy": False}},
        {},
    ),
}


def spaces_last(model):
    """Runs of spaces have the lowest score and low ids, as in LLaMA's own model."""
    for i, piece in enumerate(model.pieces):
        if len(piece.piece) > 1 and not piece.piece.strip("\u2581"):
            model.pieces[i].score = -1e9
    return model


def make(folder, name):
    files, changes = FOLDERS[name]
    folder.mkdir(exist_ok=True)
    model = spaces_last(trained(CODE, kind="bpe", **{**LLAMA, **changes}))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    for file, content in {"config.json": KEEP, **files}.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / "tokenizer.model"


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("chat", "a <tool> b", ["\u2581a", "\u2581", "<tool>", "\u2581", "b"]),
        ("chat", "a<tool>b", ["\u2581a", "<tool>", "b"]),
        ("legacy", "a<tool>b", ["\u2581a", "<tool>", "\u2581", "b"]),
        ("chat", "a <left> <right> b", ["\u2581a", "<left>", "\u2581", "<right>", "b"]),
        ("chat", " the", ["\u2581the"]),
        ("mistral", " the", ["\u2581", "\u2581the"]),
        ("mistral", "a<tool>b", ["\u2581a", "<tool>", "\u2581", "b"]),
        ("mistral, not legacy", "a<tool>b", ["\u2581a", "<tool>", "b"]),
        ("no class", "a<tool>b", ["\u2581a", "<tool>", "\u2581", "b"]),
        ("no prefix", "a<tool> the", ["a", "<tool>", "\u2581the"]),
        ("chat", "a  of", ["\u2581a", "\u2581\u2581", "of"]),
        ("mistral", "a  of", ["\u2581a", "\u2581", "\u2581of"]),
    ],
)
def test_pieces_of_a_text_with_added_tokens(name, text, expected, tmp_path):
    files = sentencepiece_folder.files(make(tmp_path, name))
    converted = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    ids = converted.encode(text, add_special_tokens=False).ids
    assert [converted.id_to_token(i) for i in ids] == expected


def test_special_tokens_are_those_of_the_files(tmp_path):
    def read(name):
        return json.loads(sentencepiece_folder.files(make(tmp_path / name, name))["tokenizer_config.json"])

    chat = read("chat")
    assert (chat["bos_token"], chat["eos_token"], chat["pad_token"]) == ("<s>", "<|im_end|>", "<unk>")
    assert chat["added_tokens_decoder"] == {str(i): each for i, each in DECODER.items()}
    old = read("special_tokens_map")
    assert (old["bos_token"], old["eos_token"], old["pad_token"]) == ("<s>", "<end>", "<pad>")
    more = read("further special tokens")
    assert more["additional_special_tokens"] == ["<a>", "<b c>"]
    assert [each["content"] for each in more["added_tokens_decoder"].values()] == [
        *("<unk>", "<s>", "</s>", "<new>", "<image>", "<a>", "<b c>")
    ]


def test_model_alone_stays_as_it_is(tmp_path):
    path = make(tmp_path, "templates alone")
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "additional_chat_templates" / "tool.jinja").unlink()
    (tmp_path / "additional_chat_templates").rmdir()
    assert sentencepiece_folder.files(path) == {}


REFUSED = {
    "an id that is not the next": ({"added_tokens.json": {"<tool>": 505}}, "would have the id 500, not 505"),
    "a renamed piece": (
        {"tokenizer_config.json": {"added_tokens_decoder": {"10": token("<tool>")}}},
        "'<tool>' would have the id 500, not 10",
    ),
    "another class": ({"tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer"}}, "class GemmaTok"),
    "code": ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, "of a llama model"),
    "another model": ({"config.json": {"model_type": "qwen2"}, "added_tokens.json": {}}, "of a qwen2 model"),
    "a prefix": ({"tokenizer_config.json": {**OLD, "add_prefix_space": False}}, "add_prefix_space"),
    "named extras": ({"tokenizer_config.json": {"extra_special_tokens": {"a": "b"}}}, "is not a list"),
}
OTHER_MODELS = {
    "unigram": ("unigram", {**LLAMA, "vocab_size": 400}, "unigram models"),
    "symbols": ("bpe", {**GEMMA, "add_dummy_prefix": True}, "user-defined symbols"),
    "no bytes": ("bpe", {**LLAMA, "byte_fallback": False}, "characters that are not pieces"),
    "normalization": ("bpe", {**LLAMA, "normalization_rule_name": "nfkc"}, "normalization"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_with_other_ids_are_refused(case, tmp_path):
    path, (files, message) = make(tmp_path, "templates alone"), REFUSED[case]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{message}.*: let transformers write a tokenizer\.json, Auto"):
        sentencepiece_folder.files(path)


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_models_that_transformers_reads_in_another_way_are_refused(case, tmp_path):
    kind, settings, rule = OTHER_MODELS[case]
    path = make(tmp_path, "added tokens")
    path.write_bytes(trained(CODE, kind=kind, **settings).SerializeToString())
    with pytest.raises(ValueError, match=rf"\(it reads {rule} in another way\)"):
        sentencepiece_folder.files(path)


@pytest.fixture
def auto(monkeypatch):
    """transformers' AutoTokenizer, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="needs the extra hf-test")
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", FOLDERS)
def test_export_of_an_import_has_the_tokenizer_of_the_original(name, tmp_path, auto, capsys):
    from tests.support.transformers_models import save_model

    source, run, out = tmp_path / "model", tmp_path / "run", tmp_path / "out"
    save_model(source, vocab_size=520)
    config = json.loads((source / "config.json").read_text())
    make(source, name)
    kind = json.loads((source / "config.json").read_text())["model_type"]
    (source / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    if kind == "mistral":  # only its tokenizer is looked at here
        for path, content in sentencepiece_folder.files(make(tmp_path / "own", name)).items():
            (source / path).write_bytes(content)
    assert import_command(source, run) == 0
    assert export.main(["export", f"--workdir={run}", f"--output={out}"]) == 0
    theirs, ours = auto(tmp_path / "own" if kind == "mistral" else source), auto(out)
    for attribute in ("special_tokens_map", "all_special_tokens", "chat_template", "padding_side"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    decoders = ({i: repr(each) for i, each in sorted(t.added_tokens_decoder.items())} for t in (ours, theirs))
    assert len(ours) == len(theirs) and next(decoders) == next(decoders)
    added = [each.content for each in theirs.added_tokens_decoder.values()]
    ends = [(one, two) for one in ("", "a", " ") for two in ("", "b", " b", "  ")]
    around = [f"{one}{each}{two}" for each in added for one, two in ends]
    documents = [*hard_documents(added), *around, "a  of", "  the", " ", ""]
    assert ours(documents)["input_ids"] == theirs(documents)["input_ids"]
    expected = theirs(documents, add_special_tokens=False)["input_ids"]
    assert ours(documents, add_special_tokens=False)["input_ids"] == expected
    assert [ours.decode(ids) for ids in expected] == [theirs.decode(ids) for ids in expected]
    own = tokenizer.load(run / "tokenizer" / "tokenizer.json")
    special = [each.content for each in theirs.added_tokens_decoder.values() if each.special]
    plain = [i for i, text in enumerate(documents) if not any(each in text for each in special)]
    rows = own.encode_documents([documents[i] for i in plain])
    assert [ids.tolist() for ids in rows] == [expected[i] for i in plain] and len(plain) > 500
    bos = record.read_facts(run)["rows"]["train"].get("bos")
    assert bos == (theirs("a")["input_ids"][0] if theirs.add_bos_token else None)
