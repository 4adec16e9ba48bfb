"""The files with which `transformers.AutoTokenizer.from_pretrained` loads a run's tokenizer, a fast one.

With `add_special_tokens=False, split_special_tokens=True` it gives the run's ids. Without the latter
`AutoTokenizer` reads "</s>" in a text as the token, as its users expect, while the run reads it as text. (The
user's own unigram tokenizer.json reads it as the token either way.) By default a text begins with bos if the
run's documents do, or as a tokenizer.json specifies; nothing is appended. sentencepiece_json.py lists where a
converted SentencePiece model is not exact; one that cannot be converted at all is exported unconverted.
"""

import hashlib
import json
from typing import Any

import tokenizers

from relora_jax.errors import UserError
from relora_jax.hf import probes, sentencepiece_json
from relora_jax.hf.sentencepiece_json import BPE, NORMAL, UNKNOWN
from relora_jax.tokenizer import sidecars
from relora_jax.tokenizer.hugging_face import FILE, HuggingFace
from relora_jax.tokenizer.sidecars import ADDED, CONFIG, FOLDER, SPECIAL, TEMPLATES
from relora_jax.tokenizer.tokenizer import Tokenizer

MODEL = "tokenizer.model"  # a SentencePiece model, which llama.cpp reads as BPE
UNIGRAM_MODEL = "spiece.model"  # which llama.cpp does not read: it would give it other ids
MORE_TEMPLATES = f"{FOLDER}/*.jinja"
COPIED = (MODEL, ADDED, *TEMPLATES)  # along with a tokenizer.json
FILES = (FILE, CONFIG, SPECIAL, UNIGRAM_MODEL, *COPIED, MORE_TEMPLATES)  # all that may be written


class NoFastFormError(UserError):
    """The `tokenizers` library cannot reproduce the ids of a SentencePiece model: export it `unconverted`."""


def files(tokenizer: Tokenizer, *, length: int) -> dict[str, bytes]:
    """{name: content} of the tokenizer's files; `length` is the model's longest text, in ids.

    NoFastFormError if it cannot be converted. UserError if its file changed after it was loaded.
    """
    content = _read(tokenizer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # other classes rebuild it from parts of the file
        "model_max_length": length,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer.model, HuggingFace):
        return _of_hugging_face(tokenizer, content, settings)
    try:
        return _of_sentencepiece(tokenizer, content, settings)
    except ValueError as error:
        raise NoFastFormError(
            f"tokenizer {tokenizer.path} cannot be converted to {FILE}: {error}; an export contains it as "
            f"{MODEL}, from which transformers may make other ids"
        ) from error


def note(tokenizer: Tokenizer) -> str:
    """A line with the number of hard texts whose ids differ due to a normalization rule; empty if it is 0."""
    if isinstance(tokenizer.model, HuggingFace):
        return ""
    model = sentencepiece_json.parse(_read(tokenizer))
    if not model.normalizer_spec.precompiled_charsmap:
        return ""
    texts = probes.texts(model)
    count = len(differing(tokenizer, model, sentencepiece_json.convert(model), texts))
    message = f"{count:,} of {len(texts):,} hard texts have different ids in {FILE} and in the run"
    return f"{message}: the tokenizers library applies normalization rules differently" if count else ""


def check(tokenizer: Tokenizer) -> None:
    """NoFastFormError if the tokenizer could only be exported unconverted."""
    if not isinstance(tokenizer.model, HuggingFace):
        files(tokenizer, length=1)


def unconverted(tokenizer: Tokenizer) -> dict[str, bytes]:
    """{name: content} of a SentencePiece model without a fast form.

    There is no tokenizer_config.json: transformers would convert some models to a tokenizer with other ids.
    """
    return {MODEL: _read(tokenizer)}


def _read(tokenizer: Tokenizer) -> bytes:
    try:
        content = tokenizer.path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {tokenizer.path} cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != tokenizer.sha256:
        raise UserError(f"tokenizer {tokenizer.path} changed after it was loaded: run the command again")
    return content


def _of_sentencepiece(tokenizer: Tokenizer, content: bytes, config: dict[str, Any]) -> dict[str, bytes]:
    model = sentencepiece_json.parse(content)
    special = _special(tokenizer)
    converted = sentencepiece_json.convert(model, special=special.values(), bos=tokenizer.bos)
    _compare(tokenizer, model, converted)
    if tokenizer.model.bos is not None:  # named even if no text of the run starts with it
        special.setdefault("bos_token", tokenizer.model.bos)
    config |= {name: model.pieces[i].piece for name, i in special.items()}
    config["add_bos_token"] = tokenizer.bos is not None  # this and the prefix are for llama.cpp
    config["add_prefix_space"] = model.normalizer_spec.add_dummy_prefix
    config["unk_token"] = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    config["model_input_names"] = ["input_ids", "attention_mask"]
    if any(model.pieces[i].type == NORMAL for i in special.values()):
        config["split_special_tokens"] = True  # ordinary text contains them
    name = MODEL if model.trainer_spec.model_type == BPE else UNIGRAM_MODEL
    return {FILE: converted.to_str().encode(), CONFIG: _json(config), name: content}


def _special(tokenizer: Tokenizer) -> dict[str, int]:
    """{name in transformers: id} of the run's special tokens, without a pad that is just eos."""
    ids = {"eos_token": tokenizer.eos}
    if tokenizer.pad != tokenizer.eos or tokenizer.model.pad not in (None, tokenizer.eos):
        ids["pad_token"] = tokenizer.pad
    return ids if tokenizer.bos is None else {**ids, "bos_token": tokenizer.bos}


def _compare(tokenizer: Tokenizer, model: Any, converted: tokenizers.Tokenizer) -> None:
    """UserError if a text has other ids than ours, and no normalization rule explains it (see `note`)."""
    if not model.normalizer_spec.precompiled_charsmap:
        for text, ours, theirs in differing(tokenizer, model, converted, probes.texts(model)):
            raise UserError(f"{text!r} would have the ids {theirs}, not {ours}")


def differing(
    tokenizer: Tokenizer, model: Any, converted: tokenizers.Tokenizer, texts: list[str]
) -> list[tuple[str, list[int], list[int]]]:
    """(text, our ids, ids of `converted`) of each text for which they differ, except for ties."""
    converted.encode_special_tokens = True
    encodings = converted.encode_batch_fast(texts, add_special_tokens=False)
    converted.encode_special_tokens = False
    return [
        (text, ours.tolist(), theirs.ids)
        for text, ours, theirs in zip(texts, tokenizer.encode_documents(texts), encodings, strict=True)
        if ours.tolist() != theirs.ids and not sentencepiece_json.is_tie(model, ours.tolist(), theirs.ids)
    ]


def _of_hugging_face(tokenizer: Tokenizer, content: bytes, ours: dict[str, Any]) -> dict[str, bytes]:
    """The tokenizer.json without BPE dropout, and the files next to it, with our special tokens."""
    settings = json.loads(content)
    if settings["model"].get("dropout"):
        settings["model"]["dropout"] = None
        content = _json(settings)
    raw = tokenizers.Tokenizer.from_str(content.decode())
    tokens: dict[str, str] = {}
    for name, i in _special(tokenizer).items():
        if (token := raw.id_to_token(i)) is None:
            raise UserError(f"tokenizer {tokenizer.path} has no token {i}, which the run uses as {name}")
        tokens[name] = token
    folder = tokenizer.path.parent if tokenizer.path.name == FILE else None
    config = sidecars.read(folder / CONFIG) if folder else {}
    config.pop("auto_map", None)  # custom code
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    added = {token.content for token in raw.get_added_tokens_decoder().values()}
    if not added.issuperset(tokens.values()):
        config["split_special_tokens"] = True  # ordinary text contains them
    result = {FILE: content, CONFIG: _json(_with_tokens(config | ours, tokens))}
    if folder and (folder / SPECIAL).is_file():
        result[SPECIAL] = _json(_with_tokens(sidecars.read(folder / SPECIAL), tokens))
    if folder:
        copied = [folder / name for name in COPIED if (folder / name).is_file()]
        copied += folder.glob(MORE_TEMPLATES)
        result |= {str(path.relative_to(folder)): path.read_bytes() for path in copied}
    return result


def _with_tokens(config: dict[str, Any], tokens: dict[str, str]) -> dict[str, Any]:
    """The config with these tokens; an equal one keeps its form, which may be an object."""
    for name, token in tokens.items():
        value = config.get(name)
        if sidecars.content(value) != token:
            config[name] = token
    return config


def _json(content: dict[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=2).encode() + b"\n"
