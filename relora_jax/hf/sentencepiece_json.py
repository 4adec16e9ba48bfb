"""A SentencePiece model as a tokenizer of Hugging Face's `tokenizers` library, with the same ids.

BPE is exact, but for merges of equal score, of which SentencePiece takes the first in the text and the
library the lowest id: probes.py has texts that show a difference. A unigram model adds scores in float32
here and in float64 there: of segmentations whose scores are equal to float32's precision ("77" + "7" or
"7" + "77") the two may take another, about one piece in 300,000 of English text. A normalization rule (T5's,
say) is the library's `Precompiled`, as in everybody's exports: it looks up grapheme by grapheme, where
SentencePiece rewrites the longest sequence that it knows. What has no counterpart there is a UserError.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from relora_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, SYMBOL, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of pieces; a symbol: user-defined
UNIGRAM, BPE = 1, 2  # types of models
SPACE = "\u2581"
UNKNOWN_CHARACTER = "\ufdd0"  # no character of any text
SMALLEST = 2.0**-126  # SentencePiece's first guess of the highest score, which is no higher than 0


def parse(content: bytes) -> Any:
    """The ModelProto in a file's content."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # an older protobuf than SentencePiece was made with raises its own
        raise UserError(
            f"SentencePiece's settings cannot be read: {error}: pip install -U protobuf"
        ) from error
    return sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore


def convert(model: Any, *, special: Iterable[int] = (), bos: int | None = None) -> tokenizers.Tokenizer:
    """The tokenizer of a ModelProto: control pieces and `special` ids are its special tokens.

    `bos` begins a text unless it is encoded with `add_special_tokens=False`. A special token that is written
    out in a text is parsed; with `encode_special_tokens` it is text, as SentencePiece has it.
    """
    _check(model)
    rule, kind = model.normalizer_spec, model.trainer_spec.model_type
    symbols = [piece.piece for piece in model.pieces if piece.type == SYMBOL]
    before: list[Any] = []
    if rule.add_dummy_prefix and not rule.remove_extra_whitespaces:
        before.append(normalizers.Prepend(SPACE))  # first, since a rule may leave nothing to put it before
    if rule.precompiled_charsmap:
        before.append(normalizers.Precompiled(rule.precompiled_charsmap))
    before += _spaces(rule)
    if kind == BPE:
        made = tokenizers.Tokenizer(_bpe(model))
        # a symbol with a space is never found, here as there: texts have SPACE where symbols are looked for
        if symbols := [symbol for symbol in symbols if " " not in symbol]:
            made = _with_symbols(model, made, symbols)
    else:
        made = tokenizers.Tokenizer(_unigram(model))
        if names := _names(model):
            if model.trainer_spec.byte_fallback:
                made.pre_tokenizer = pre_tokenizers.Split(Regex(names), "isolated")
            else:
                before.append(normalizers.Replace(Regex(names), UNKNOWN_CHARACTER))
    made.normalizer = normalizers.Sequence(before)
    made.decoder = decoders.Sequence([*_decoders(model)])
    chosen = {i for i, piece in enumerate(model.pieces) if piece.type in (CONTROL, UNKNOWN)} | {*special}
    tokens = [model.pieces[i].piece for i in sorted(chosen) if model.pieces[i].type != SYMBOL]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    if bos is not None:
        begin = model.pieces[bos].piece
        made.post_processor = processors.TemplateProcessing(
            single=[begin, "$A"], pair=[begin, "$A", f"{begin}:1", "$B:1"], special_tokens=[(begin, bos)]
        )
    return made


def is_tie(model: Any, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a unigram model gives both segmentations of a text the same score, to float32's precision."""
    if model.trainer_spec.model_type != UNIGRAM:
        return False
    scores = _scores(model)
    first, second = (sum(scores[i] for i in ids) for ids in (one, other))
    return abs(first - second) <= 2.0**-22 * abs(first)


def _check(model: Any) -> None:
    """UserError for settings that the library has not, or not so that ids stay equal."""
    trainer, rule, pieces = model.trainer_spec, model.normalizer_spec, model.pieces
    if trainer.model_type not in (UNIGRAM, BPE):
        name = trainer.ModelType.Name(trainer.model_type)
        raise UserError(f"its model_type {name} has no counterpart: only BPE and UNIGRAM have")
    if trainer.treat_whitespace_as_suffix or not rule.escape_whitespaces:
        raise UserError("its treat_whitespace_as_suffix or escape_whitespaces has no counterpart")
    if model.HasField("denormalizer_spec") and model.denormalizer_spec.precompiled_charsmap:
        raise UserError("its denormalization rule has no counterpart")
    if unused := [piece.piece for piece in pieces if piece.type == UNUSED]:
        raise UserError(f"its unused piece {unused[0]!r} has no counterpart")
    known = {piece.piece for piece in pieces if piece.type in (NORMAL, SYMBOL)}
    for piece in pieces:
        if piece.type == NORMAL and not known.issuperset(piece.piece):
            raise UserError(f"its piece {piece.piece!r} holds a character that is no piece")
        if piece.type not in (NORMAL, SYMBOL) and len(piece.piece) == 1:
            raise UserError(f"its special piece {piece.piece!r} is a single character")
    symbols = [piece.piece for piece in pieces if piece.type == SYMBOL]
    rewritten = rule.remove_extra_whitespaces or rule.precompiled_charsmap
    if symbols and trainer.model_type == BPE and rewritten:
        raise UserError(
            f"its user-defined symbol {symbols[0]!r} has no counterpart beside a BPE model's "
            "remove_extra_whitespaces or normalization rule"
        )
    if rule.remove_extra_whitespaces and any(" " in symbol or SPACE in symbol for symbol in symbols):
        raise UserError("its user-defined symbol with a space has no counterpart: extra spaces are removed")


def _spaces(rule: Any) -> Iterable[Any]:
    """Normalizers after the rule: no extra spaces, the one in front, and the sign they are written by."""
    extra = rule.remove_extra_whitespaces
    if extra:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
        if rule.add_dummy_prefix:
            yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)
    if extra:
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")  # also where the text itself has the sign


def _decoders(model: Any) -> Iterable[Any]:
    rule = model.normalizer_spec
    yield decoders.Replace(SPACE, " ")
    if model.trainer_spec.byte_fallback:
        yield decoders.ByteFallback()
    yield decoders.Fuse()
    if rule.add_dummy_prefix or rule.remove_extra_whitespaces:
        yield decoders.Strip(" ", 1, 0)


def merges(model: Any) -> list[tuple[float, int, str, str]]:
    """(-score, id, left, right) of each split of a piece, in order.

    SentencePiece joins any two that make a piece, the best first.
    """
    normal = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    found = [
        (-model.pieces[i].score, i, piece[:cut], piece[cut:])
        for piece, i in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return sorted(found)


def _with_symbols(model: Any, plain: tokenizers.Tokenizer, symbols: list[str]) -> tokenizers.Tokenizer:
    """Texts are cut at symbols, and a part that is a whole piece is that piece, as each symbol is.

    The name of a piece that `plain` spells otherwise, such as a byte's, is cut where it has two pieces.
    """
    made = tokenizers.Tokenizer(_bpe(model, ignore_merges=True))
    names = [piece.piece for piece in model.pieces if piece.type != SYMBOL]
    ids = (i for i, piece in enumerate(model.pieces) if piece.type != SYMBOL)
    spelled = zip(ids, names, plain.encode_batch(names), strict=True)
    odd = {name: [end for _, end in found.offsets[:-1]] for i, name, found in spelled if found.ids != [i]}
    cuts = []
    for name, ends in odd.items():
        at = next((at for at in ends if name[:at] not in odd and name[at:] not in odd), None)
        if at is None:
            raise UserError(f"its piece {name!r} has no counterpart beside user-defined symbols")
        cuts.append(f"{re.escape(name[:at])}(?={re.escape(name[at:])}\\z)")
    first = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))  # the longest one is found
    steps = [pre_tokenizers.Split(Regex(first), "isolated")]
    if cuts:
        steps.append(pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(cuts)})"), "isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence([*steps])
    return made


def _bpe(model: Any, *, ignore_merges: bool = False) -> models.BPE:
    pieces = model.pieces
    return models.BPE(
        vocab={piece.piece: i for i, piece in enumerate(pieces)},
        merges=[(left, right) for _, _, left, right in merges(model)],
        unk_token=next(piece.piece for piece in pieces if piece.type == UNKNOWN),
        fuse_unk=True,
        byte_fallback=model.trainer_spec.byte_fallback,
        ignore_merges=ignore_merges,
    )


def _unigram(model: Any) -> models.Unigram:
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    vocabulary = [(piece.piece, score) for piece, score in zip(model.pieces, _scores(model), strict=True)]
    return models.Unigram(vocabulary, unk_id=unknown, byte_fallback=model.trainer_spec.byte_fallback)


def _scores(model: Any) -> list[float]:
    """The scores of pieces in a text; special ones, which no text may give, have less than any spelling."""
    normal = [piece.score for piece in model.pieces if piece.type == NORMAL]
    names = [piece.piece for piece in model.pieces if piece.type not in (NORMAL, SYMBOL)]
    least = min([0.0, *normal]) * max(map(len, names)) - 1.0
    a_byte = 0.1 if _counts_bytes() else max([SMALLEST, *normal])

    def score(piece: Any) -> float:
        if piece.type == SYMBOL:
            return len(piece.piece.encode()) * a_byte - 0.1
        return piece.score if piece.type == NORMAL else least

    return [score(piece) for piece in model.pieces]


def _counts_bytes() -> bool:
    """Whether this SentencePiece gives a symbol of n bytes 0.1 n - 0.1 (0.2.3), or the highest score n times.

    Asked of a model where the one is more than its symbol's part of a longer piece, and the other is less.
    """
    model = parse(b"")
    pieces = ("<unk>", 0, UNKNOWN), ("ab", 0, SYMBOL), ("abc", -9, NORMAL), ("c", -9, NORMAL)
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    rule = model.normalizer_spec
    rule.add_dummy_prefix = rule.remove_extra_whitespaces = False
    asked = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return len(asked.encode("abc")) == 2


def _names(model: Any) -> str:
    """A pattern of a character that is no piece, in each special piece's name with such a one.

    Apart, or replaced by another unknown one, it keeps the name in a text from being read as that piece.
    Other names never are: the piece scores less than the name's characters.
    """
    known = {piece.piece for piece in model.pieces if piece.type in (NORMAL, SYMBOL)}
    found = []
    for piece in model.pieces:
        name = piece.piece
        at = next((at for at, char in enumerate(name) if char not in known), None)
        if piece.type not in (NORMAL, SYMBOL) and at is not None:
            start, char, end = map(re.escape, (name[:at], name[at], name[at + 1 :]))
            found.append(f"(?<={start})" * bool(start) + char + f"(?={end})")
    return "|".join(found)
