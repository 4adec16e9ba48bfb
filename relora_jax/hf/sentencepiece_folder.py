"""A SentencePiece model with transformers' files next to it, as the tokenizer.json of its AutoTokenizer.

transformers (5.24) makes a tokenizer of them that adds tokens to the model's pieces. Its LlamaTokenizer puts
a space before a text only if the text has none, and (unless `legacy`) none after an added token, and merges
in the order of ids; for other classes, SentencePiece's rules hold. What would come out with other ids than
AutoTokenizer's is a UserError that asks for a tokenizer.json, which transformers writes.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, pre_tokenizers, processors

from relora_jax.errors import UserError
from relora_jax.hf import probes, sentencepiece_json, tokenizer_files
from relora_jax.hf.sentencepiece_json import BPE, BYTE, CONTROL, SPACE, SYMBOL
from relora_jax.tokenizer import sidecars
from relora_jax.tokenizer import tokenizer as loading
from relora_jax.tokenizer.hugging_face import FILE
from relora_jax.tokenizer.sidecars import (
    ADDED,
    CONFIG,
    DECODER,
    EXTRA,
    FLAGS,
    FOLDER,
    NAMES,
    SPECIAL,
    TEMPLATES,
)

CONVERTED = (CONFIG, SPECIAL, ADDED)  # what tokenizer.json and tokenizer_config.json stand for
NEXT_TO_IT = (*CONVERTED, *TEMPLATES, FOLDER)  # any of these makes it transformers' tokenizer
LLAMA = "LlamaTokenizer"
PLAIN = (None, "PreTrainedTokenizer", "TokenizersBackend")  # classes without rules of their own
MODEL_TYPES = ("llama", "mistral")  # in other models, transformers takes their own class


class _Tokens(NamedTuple):
    """The special tokens by name, further special tokens, and the tokens whose ids the files state."""

    named: dict[str, AddedToken | None]
    extra: list[AddedToken]
    by_id: dict[int, AddedToken]


def files(path: Path) -> dict[str, bytes]:
    """{name: content} of tokenizer.json and tokenizer_config.json; empty if nothing stands next to `path`."""
    folder = path.parent
    if path.suffix != ".model" or not any((folder / name).exists() for name in NEXT_TO_IT):
        return {}
    try:
        return _files(path)
    except ValueError as error:
        raise UserError(
            f"{path} and the files next to it give no tokenizer with the ids of transformers ({error}): "
            f"let transformers write a {FILE}, AutoTokenizer.from_pretrained({str(folder)!r})"
            f".save_pretrained({str(folder)!r}), and check its ids"
        ) from error


def note(path: Path, content: bytes) -> str:
    """A line with the number of hard texts with other ids than SentencePiece's; empty if it is 0."""
    model = sentencepiece_json.parse(path.read_bytes())
    texts, converted = probes.texts(model), tokenizers.Tokenizer.from_str(content.decode())
    differing = tokenizer_files.differing(loading.load(path, eos_id=0), model, converted, texts)
    return (
        f"{len(differing):,} of {len(texts):,} hard texts have other ids in transformers than in {path}, "
        f"such as {differing[0][0]!r}; the run has those of transformers"
        if differing
        else ""
    )


def _files(path: Path) -> dict[str, bytes]:
    config, model = sidecars.read(path.parent / CONFIG), sentencepiece_json.parse(path.read_bytes())
    is_llama = _is_llama(path.parent, config)
    space = _space(model, config, is_llama=is_llama)
    tokenizer_files.check(loading.load(path, eos_id=0))  # that the conversion has SentencePiece's ids
    tokens = _tokens(path.parent, model, config, is_llama=is_llama)
    tokenizer = _tokenizer(model, space, tokens, is_llama=is_llama)
    _add_template(tokenizer, tokens, config)
    decoder = {i: _flags(token) for i, token in sorted(tokenizer.get_added_tokens_decoder().items())}
    config |= {name: token and token.content for name, token in tokens.named.items()}
    for name in EXTRA:
        config.pop(name, None)
    if is_llama:
        config.setdefault("padding_side", "left")
    config |= {
        EXTRA[1]: [token.content for token in tokens.extra],
        "tokenizer_class": "PreTrainedTokenizerFast",
        DECODER: decoder,
    }
    return {FILE: tokenizer.to_str().encode(), CONFIG: json.dumps(config, ensure_ascii=False).encode()}


def _is_llama(folder: Path, config: dict[str, Any]) -> bool:
    """Whether AutoTokenizer takes LlamaTokenizer; ValueError if it takes another class with own rules."""
    settings = sidecars.read(folder / "config.json")
    name = config.get("tokenizer_class") or settings.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else name
    kind = settings.get("model_type")
    if "auto_map" in config or name not in (*PLAIN, LLAMA) or kind not in MODEL_TYPES:
        raise UserError(f"tokenizer_class {name} of a {kind} model is not supported")
    return name == LLAMA and kind == "llama"


def _space(model: Any, config: dict[str, Any], *, is_llama: bool) -> str | None:
    """The `prepend_scheme` of Metaspace; None where the conversion's own rule is also transformers'.

    ValueError for a model that transformers reads by other rules than SentencePiece.
    """
    spec, pieces = model.normalizer_spec, model.pieces
    adds, legacy = spec.add_dummy_prefix, bool(config.get("legacy", not is_llama))
    is_bpe, has_bytes = model.trainer_spec.model_type == BPE, model.trainer_spec.byte_fallback
    uses_metaspace = is_llama or (adds and not legacy)
    prefix = config.get("add_prefix_space")
    names = {piece.piece for piece in pieces}
    byte_names = [piece.piece for piece in pieces if piece.type == BYTE]
    cuts = [(name[:cut], name[cut:]) for name in byte_names for cut in range(1, len(name))]
    for is_other, rule in (
        (any(piece.type == SYMBOL for piece in pieces), "user-defined symbols"),
        (not is_bpe and (uses_metaspace or has_bytes), "unigram models"),
        (uses_metaspace and not has_bytes, "characters that are not pieces"),
        (uses_metaspace and (spec.precompiled_charsmap or spec.remove_extra_whitespaces), "normalization"),
        (is_llama and (prefix is None or bool(prefix)) != adds, "add_prefix_space"),
        (is_llama and any(names.issuperset(parts) for parts in cuts), "names of bytes"),
    ):
        if is_other:
            raise UserError(f"it reads {rule} in another way")
    return ("always" if legacy else "first") if uses_metaspace and adds else None


def _tokens(folder: Path, model: Any, config: dict[str, Any], *, is_llama: bool) -> _Tokens:
    spec = model.trainer_spec
    defaults = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if not is_llama:
        ids = {"bos": spec.bos_id, "eos": spec.eos_id, "unk": spec.unk_id}
        defaults = {f"{name}_token": getattr(spec, f"{name}_piece") for name, i in ids.items() if i >= 0}
    settings, by_id = defaults | config, {}
    if decoder := config.get(DECODER):
        by_id = {int(i): _token(token) for i, token in decoder.items()}
    else:  # as files were before
        special = sidecars.read(folder / SPECIAL)
        settings |= {name: value for name, value in special.items() if name not in EXTRA}
        texts = {_token(settings[name]).content for name in NAMES if settings.get(name)}
        texts |= {_token(value).content for value in _extra(config)}
        for text, i in sidecars.read(folder / ADDED).items():
            by_id[i] = _token({"content": text, "special": text in texts})
    if not is_llama and model.normalizer_spec.add_dummy_prefix:
        by_id = {i: _token(_flags(token) | {"normalized": False}) for i, token in by_id.items()}
    own = {token.content: token for token in by_id.values()}
    more = [name for name in settings if name.endswith("_token") and isinstance(settings[name], (str, dict))]
    named = {}
    for name in dict.fromkeys((*NAMES, *more)):
        if name in settings:
            token = settings[name] and _token(settings[name])
            named[name] = token and own.get(token.content, token)
    control = [piece.piece for piece in model.pieces if piece.type == CONTROL]
    return _Tokens(named, [_token(value) for value in _extra(config) or control], by_id)


def _extra(config: dict[str, Any]) -> list[Any]:
    values = next((config[name] for name in EXTRA if config.get(name)), [])
    if not isinstance(values, list):
        raise UserError(f"{EXTRA[0]} is not a list")
    return values


def _token(value: Any) -> AddedToken:
    """A token of a settings file: its text, or an object; special unless it says otherwise."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {name: value.get(name, False) for name in ("single_word", "lstrip", "rstrip", "special")}
    return AddedToken(value["content"], normalized=value.get("normalized", not flags["special"]), **flags)


def _flags(token: AddedToken) -> dict[str, Any]:
    return {"content": token.content, **{name: getattr(token, name) for name in FLAGS}}


def _tokenizer(model: Any, space: str | None, tokens: _Tokens, *, is_llama: bool) -> tokenizers.Tokenizer:
    """The conversion of the model, with added tokens in transformers' order; ValueError for another id."""
    settings = json.loads(sentencepiece_json.convert(model).to_str()) | {"added_tokens": []}
    if is_llama:  # the piece with the lowest id first, not that with the best score
        by_id = sorted(sentencepiece_json.merges(model), key=lambda merge: merge[1])
        settings["model"]["merges"] = [[left, right] for _, _, left, right in by_id]
    if space:
        settings["normalizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
    if space:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=space, split=False)
    named = [token for token in tokens.named.values() if token]
    for token in named:
        token.special = True
    by_id = [token for _, token in sorted(tokens.by_id.items())]
    known = dict.fromkeys(token.content for token in by_id)
    new = [token for token in (*named, *tokens.extra) if token.content not in known]
    tokenizer.add_tokens([*by_id, *new])
    for i, token in tokens.by_id.items():
        if (actual := tokenizer.token_to_id(token.content)) != i:
            raise UserError(f"{token.content!r} would have the id {actual}, not {i}")
    return tokenizer


def _add_template(tokenizer: tokenizers.Tokenizer, tokens: _Tokens, config: dict[str, Any]) -> None:
    """Puts bos before a text and eos after it, if the config says so."""
    bos, eos = (
        [token.content] if token and config.get(f"add_{name}") else []
        for name, token in ((name, tokens.named.get(name)) for name in ("bos_token", "eos_token"))
    )
    if bos or eos:
        second = [*(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *second],
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*bos, *eos)],
        )
