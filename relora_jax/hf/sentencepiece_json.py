"""Converts a SentencePiece model to a tokenizer of Hugging Face's `tokenizers` library with the same ids.

BPE is exact, except for merges with the same score, of which SentencePiece takes the first in the text and
the library the lowest id: probes.py generates texts that show a difference. Unigram scores are added in
float32 by SentencePiece, in float64 by the library: of segmentations with the same score in float32 ("77" +
"7" or "7" + "77") they may choose different ones, for about one piece in 300,000 of English text. A
normalization rule (T5's, for example) becomes the library's `Precompiled`, as in other converters: it maps
grapheme by grapheme, while SentencePiece rewrites the longest known sequence. Unsupported settings are a
UserError.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from relora_jax.errors import UserError

NORMAL, UNKNOWN, CONTROL, SYMBOL, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types; SYMBOL: user-defined
UNIGRAM, BPE = 1, 2  # model types
SPACE = "\u2581"
UNKNOWN_CHARACTER = "\ufdd0"  # a noncharacter, in no text
SMALLEST = 2.0**-126  # SentencePiece's initial value for the highest score, which is at most 0


def parse(content: bytes) -> Any:
    """The ModelProto of a file's content."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except Exception as error:  # an older protobuf raises its own type
        raise UserError(
            f"SentencePiece's protobuf module cannot be imported: {error}: pip install -U protobuf"
        ) from error
    return sentencepiece_model_pb2.ModelProto.FromString(content)  # pyright: ignore


def convert(model: Any, *, special: Iterable[int] = (), bos: int | None = None) -> tokenizers.Tokenizer:
    """The tokenizer of a ModelProto; control pieces and `special` ids are its special tokens.

    `bos` precedes a text unless it is encoded with `add_special_tokens=False`. A special token in a text is
    parsed as the token; with `encode_special_tokens` it is text, as in SentencePiece.
    """
    _check(model)
    spec, kind = model.normalizer_spec, model.trainer_spec.model_type
    symbols = [piece.piece for piece in model.pieces if piece.type == SYMBOL]
    steps: list[Any] = []
    if spec.add_dummy_prefix and not spec.remove_extra_whitespaces:
        steps.append(normalizers.Prepend(SPACE))  # before a rule, which may leave an empty text
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    steps += _spaces(spec)
    if kind == BPE:
        tokenizer = tokenizers.Tokenizer(_bpe(model))
        # a symbol with a space never matches, in SentencePiece neither: texts are searched with SPACE for " "
        if symbols := [symbol for symbol in symbols if " " not in symbol]:
            tokenizer = _with_symbols(model, tokenizer, symbols)
    else:
        tokenizer = tokenizers.Tokenizer(_unigram(model))
        if pattern := _special_names(model):
            if model.trainer_spec.byte_fallback:
                tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
            else:
                steps.append(normalizers.Replace(Regex(pattern), UNKNOWN_CHARACTER))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([*_decoders(model)])
    ids = {i for i, piece in enumerate(model.pieces) if piece.type in (CONTROL, UNKNOWN)} | {*special}
    tokens = [model.pieces[i].piece for i in sorted(ids) if model.pieces[i].type != SYMBOL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in tokens])
    if bos is not None:
        token = model.pieces[bos].piece
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[token, "$A"], pair=[token, "$A", f"{token}:1", "$B:1"], special_tokens=[(token, bos)]
        )
    return tokenizer


def is_tie(model: Any, one: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a unigram model gives two segmentations of a text the same score in float32 precision."""
    if model.trainer_spec.model_type != UNIGRAM:
        return False
    scores = _scores(model)
    first, second = (sum(scores[i] for i in ids) for ids in (one, other))
    return abs(first - second) <= 2.0**-22 * abs(first)


def _check(model: Any) -> None:
    """UserError for settings with which the library could not produce the same ids."""
    trainer, spec, pieces = model.trainer_spec, model.normalizer_spec, model.pieces
    if trainer.model_type not in (UNIGRAM, BPE):
        name = trainer.ModelType.Name(trainer.model_type)
        raise UserError(f"model_type {name} is not supported, only BPE and UNIGRAM")
    if trainer.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise UserError("treat_whitespace_as_suffix or escape_whitespaces=false is not supported")
    if model.HasField("denormalizer_spec") and model.denormalizer_spec.precompiled_charsmap:
        raise UserError("a denormalization rule is not supported")
    if unused := [piece.piece for piece in pieces if piece.type == UNUSED]:
        raise UserError(f"unused piece {unused[0]!r} is not supported")
    spellable = {piece.piece for piece in pieces if piece.type in (NORMAL, SYMBOL)}
    for piece in pieces:
        if piece.type == NORMAL and not spellable.issuperset(piece.piece):
            raise UserError(f"piece {piece.piece!r} contains a character that is not a piece")
        if piece.type not in (NORMAL, SYMBOL) and len(piece.piece) == 1:
            raise UserError(f"special piece {piece.piece!r} is a single character")
    symbols = [piece.piece for piece in pieces if piece.type == SYMBOL]
    rewrites = spec.remove_extra_whitespaces or spec.precompiled_charsmap
    if symbols and trainer.model_type == BPE and rewrites:
        raise UserError(
            f"user-defined symbol {symbols[0]!r} is not supported in a BPE model with "
            "remove_extra_whitespaces or a normalization rule"
        )
    if spec.remove_extra_whitespaces and any(" " in symbol or SPACE in symbol for symbol in symbols):
        raise UserError("a user-defined symbol with a space is not supported with remove_extra_whitespaces")


def _spaces(spec: Any) -> Iterable[Any]:
    """Normalizers after the rule: remove extra spaces, add the prefix, and replace " " by SPACE."""
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(r"\A +"), "")
        yield normalizers.Replace(Regex(" {2,}"), " ")
        if spec.add_dummy_prefix:
            yield normalizers.Prepend(SPACE)
    yield normalizers.Replace(" ", SPACE)
    if spec.remove_extra_whitespaces:
        yield normalizers.Replace(Regex(rf"{SPACE}+\z"), "")  # also a SPACE of the text itself


def _decoders(model: Any) -> Iterable[Any]:
    spec = model.normalizer_spec
    yield decoders.Replace(SPACE, " ")
    if model.trainer_spec.byte_fallback:
        yield decoders.ByteFallback()
    yield decoders.Fuse()
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        yield decoders.Strip(" ", 1, 0)


def merges(model: Any) -> list[tuple[float, int, str, str]]:
    """Sorted (-score, id, left, right) of each split of a piece in two.

    SentencePiece merges any two pieces that form a piece, the best score first.
    """
    normal = {piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == NORMAL}
    splits = [
        (-model.pieces[i].score, i, piece[:cut], piece[cut:])
        for piece, i in normal.items()
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return sorted(splits)


def _with_symbols(model: Any, plain: tokenizers.Tokenizer, symbols: list[str]) -> tokenizers.Tokenizer:
    """A BPE tokenizer that splits texts at symbols; a part that equals a piece is that piece, as are symbols.

    The name of a piece that `plain` encodes otherwise, such as a byte's, is split where it has two pieces.
    """
    tokenizer = tokenizers.Tokenizer(_bpe(model, ignore_merges=True))
    names = [piece.piece for piece in model.pieces if piece.type != SYMBOL]
    ids = (i for i, piece in enumerate(model.pieces) if piece.type != SYMBOL)
    encoded = zip(ids, names, plain.encode_batch(names), strict=True)
    ends_of = {name: [end for _, end in text.offsets[:-1]] for i, name, text in encoded if text.ids != [i]}
    patterns = []
    for name, ends in ends_of.items():
        cut = next((end for end in ends if name[:end] not in ends_of and name[end:] not in ends_of), None)
        if cut is None:
            raise UserError(f"piece {name!r} is not supported in a model with user-defined symbols")
        patterns.append(f"{re.escape(name[:cut])}(?={re.escape(name[cut:])}\\z)")
    longest_first = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
    steps = [pre_tokenizers.Split(Regex(longest_first), "isolated")]
    if patterns:
        steps.append(pre_tokenizers.Split(Regex(rf"\A(?:{'|'.join(patterns)})"), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps])
    return tokenizer


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
    """The score of each piece; special ones, which must not occur in a text, score less than any spelling."""
    normal = [piece.score for piece in model.pieces if piece.type == NORMAL]
    names = [piece.piece for piece in model.pieces if piece.type not in (NORMAL, SYMBOL)]
    least = min([0.0, *normal]) * max(map(len, names)) - 1.0
    byte_score = 0.1 if _scores_bytes() else max([SMALLEST, *normal])

    def score(piece: Any) -> float:
        if piece.type == SYMBOL:
            return len(piece.piece.encode()) * byte_score - 0.1
        return piece.score if piece.type == NORMAL else least

    return [score(piece) for piece in model.pieces]


def _scores_bytes() -> bool:
    """Whether SentencePiece scores a symbol of n bytes `0.1 * n - 0.1` (0.2.3), or n times the highest score.

    Checked with a model in which only the former makes "ab" + "c" beat "abc".
    """
    model = parse(b"")
    pieces = ("<unk>", 0, UNKNOWN), ("ab", 0, SYMBOL), ("abc", -9, NORMAL), ("c", -9, NORMAL)
    for piece, score, kind in pieces:
        model.pieces.add(piece=piece, score=score, type=kind)
    spec = model.normalizer_spec
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return len(processor.encode("abc")) == 2


def _special_names(model: Any) -> str:
    """A pattern that matches the first character that is not a piece within each special piece's name.

    Isolated, or replaced by another unknown one, it keeps the name in a text from being read as that piece.
    A name without such a character never is: the piece scores less than the name's characters.
    """
    spellable = {piece.piece for piece in model.pieces if piece.type in (NORMAL, SYMBOL)}
    patterns = []
    for piece in model.pieces:
        name = piece.piece
        at = next((at for at, char in enumerate(name) if char not in spellable), None)
        if piece.type not in (NORMAL, SYMBOL) and at is not None:
            start, char, end = map(re.escape, (name[:at], name[at], name[at + 1 :]))
            patterns.append(f"(?<={start})" * bool(start) + char + f"(?={end})")
    return "|".join(patterns)
