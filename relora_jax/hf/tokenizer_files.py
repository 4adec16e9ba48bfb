"""A run's tokenizer as the files that `transformers.AutoTokenizer.from_pretrained` reads, the fast one.

With `add_special_tokens=False` its ids are the run's: of every text with `split_special_tokens=True`, and
without it of texts in which no special token is written out. `AutoTokenizer` reads "</s>" in a text as the
token, as its users expect; the run took it for text. (A unigram tokenizer.json of one's own reads it so
either way.) By default bos begins a text where it begins the run's documents, or where such a file has it
so; nothing ends a text. sentencepiece_json.py says what of a SentencePiece model is not kept equal, and
one that has no such form at all goes out as it is.
"""

import hashlib
import json
from typing import Any

import tokenizers

from relora_jax.errors import UserError
from relora_jax.hf import probes, sentencepiece_json
from relora_jax.hf.sentencepiece_json import NORMAL, UNKNOWN
from relora_jax.tokenizer.hugging_face import FILE, HuggingFace, read_beside
from relora_jax.tokenizer.tokenizer import Tokenizer

CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
MODEL = "tokenizer.model"  # a SentencePiece model as it is
BESIDE = ("added_tokens.json", "chat_template.jinja")  # what else belongs to a tokenizer.json
FILES = (FILE, CONFIG, SPECIAL, MODEL, *BESIDE)  # all that may be written


class NoFastFormError(UserError):
    """A SentencePiece model that the `tokenizers` library cannot have with the same ids; says why.

    It goes out `as_it_is`.
    """


def files(tokenizer: Tokenizer, *, length: int) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files; `length` is the longest text of the model, in ids.

    NoFastFormError where it has none. UserError where its file is no longer the one that was loaded.
    """
    content = _read(tokenizer)
    ours = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # others rebuild it of parts of the file
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer.model, HuggingFace):
        return _of_hugging_face(tokenizer, content, ours)
    try:
        return _of_sentencepiece(tokenizer, content, ours)
    except ValueError as error:
        raise NoFastFormError(
            f"tokenizer {tokenizer.path} cannot become a {FILE}: {error}; an export has it as {MODEL}, "
            "of which transformers may make other ids"
        ) from error


def note(tokenizer: Tokenizer) -> str:
    """A line that says how many hard texts have other ids for a normalization rule's sake; empty for none."""
    if isinstance(tokenizer.model, HuggingFace):
        return ""
    model = sentencepiece_json.parse(_read(tokenizer))
    if not model.normalizer_spec.precompiled_charsmap:
        return ""
    texts = probes.texts(model)
    differing = len(_differing(tokenizer, model, sentencepiece_json.convert(model), texts))
    what = f"{differing:,} of {len(texts):,} hard texts have other ids in {FILE} than in the run"
    return f"{what}: the tokenizers library applies its normalization rule otherwise" if differing else ""


def check(tokenizer: Tokenizer) -> None:
    """NoFastFormError where an export of the tokenizer would find none."""
    if not isinstance(tokenizer.model, HuggingFace):
        files(tokenizer, length=1)


def as_it_is(tokenizer: Tokenizer) -> dict[str, bytes]:
    """{name: content} of a SentencePiece model without a fast form.

    Nothing beside it says how to load it: of some, transformers makes a tokenizer with other ids.
    """
    return {MODEL: _read(tokenizer)}


def _read(tokenizer: Tokenizer) -> bytes:
    try:
        content = tokenizer.path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {tokenizer.path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != tokenizer.sha256:
        raise UserError(f"tokenizer {tokenizer.path} has been changed meanwhile: begin again")
    return content


def _of_sentencepiece(tokenizer: Tokenizer, content: bytes, config: dict[str, Any]) -> dict[str, bytes]:
    model = sentencepiece_json.parse(content)
    chosen = _special(tokenizer)
    made = sentencepiece_json.convert(model, special=chosen.values(), bos=tokenizer.bos)
    _compare(tokenizer, model, made)
    config |= {name: model.pieces[i].piece for name, i in chosen.items()}
    config["unk_token"] = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    config["model_input_names"] = ["input_ids", "attention_mask"]
    if any(model.pieces[i].type == NORMAL for i in chosen.values()):
        config["split_special_tokens"] = True  # texts are full of what ends documents
    return {FILE: made.to_str().encode(), CONFIG: _json(config)}


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    """{a token's name in transformers: its id}, as the run has them; a pad that only is eos is none."""
    found = {"eos_token": tokenizer.eos}
    if tokenizer.pad != tokenizer.eos or tokenizer.model.pad is not None:
        found["pad_token"] = tokenizer.pad
    return found if tokenizer.bos is None else {**found, "bos_token": tokenizer.bos}


def _compare(tokenizer: Tokenizer, model: Any, made: tokenizers.Tokenizer) -> None:
    """UserError for a text with other ids than ours, where no normalization rule explains it (see `note`)."""
    if not model.normalizer_spec.precompiled_charsmap:
        for text, ours, other in _differing(tokenizer, model, made, probes.texts(model)):
            raise UserError(f"{text!r} would have the ids {other}, not {ours}")


def _differing(
    tokenizer: Tokenizer, model: Any, made: tokenizers.Tokenizer, texts: list[str]
) -> list[tuple[str, list[int], list[int]]]:
    """(text, our ids, those of `made`) of each text in which they differ, ties apart."""
    made.encode_special_tokens = True
    theirs = [found.ids for found in made.encode_batch_fast(texts, add_special_tokens=False)]
    made.encode_special_tokens = False
    ours = [ids.tolist() for ids in tokenizer.encode_documents(texts)]
    return [
        (text, one, other)
        for text, one, other in zip(texts, ours, theirs, strict=True)
        if one != other and not sentencepiece_json.is_tie(model, one, other)
    ]


def _of_hugging_face(tokenizer: Tokenizer, content: bytes, ours: dict[str, Any]) -> dict[str, bytes]:
    """The file as it is, without BPE's dropout, and what lies beside it, with our special tokens."""
    settings = json.loads(content)
    if settings["model"].get("dropout"):
        settings["model"]["dropout"] = None
        content = _json(settings)
    raw = tokenizers.Tokenizer.from_str(content.decode())
    tokens: dict[str, str] = {}
    for name, i in _special(tokenizer).items():
        if (token := raw.id_to_token(i)) is None:
            raise UserError(f"tokenizer {tokenizer.path} has no token {i}, which data names as its {name}")
        tokens[name] = token
    folder = tokenizer.path.parent if tokenizer.path.name == FILE else None
    config = read_beside(folder / CONFIG) if folder else {}
    config.pop("auto_map", None)  # code of its own
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    added = {token.content for token in raw.get_added_tokens_decoder().values()}
    if not added.issuperset(tokens.values()):
        config["split_special_tokens"] = True  # a token of ordinary text
    written = {FILE: content, CONFIG: _json(_with_tokens(config | ours, tokens))}
    if folder and (folder / SPECIAL).is_file():
        written[SPECIAL] = _json(_with_tokens(read_beside(folder / SPECIAL), tokens))
    if folder:
        written |= {name: (folder / name).read_bytes() for name in BESIDE if (folder / name).is_file()}
    return written


def _with_tokens(facts: dict[str, Any], tokens: dict[str, str]) -> dict[str, Any]:
    """The facts with these tokens; one that is the same already keeps its form, maybe an object."""
    for name, token in tokens.items():
        there = facts.get(name)
        if (there.get("content") if isinstance(there, dict) else there) != token:
            facts[name] = token
    return facts


def _json(facts: dict[str, Any]) -> bytes:
    return json.dumps(facts, ensure_ascii=False, indent=2).encode() + b"\n"
