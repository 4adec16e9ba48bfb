"""Texts on which a SentencePiece model and a tokenizer converted from it are most likely to differ."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from relora_jax.hf.sentencepiece_json import BPE, SPACE, SYMBOL, merges

HARD = ("", " ", "  a  b ", "a\n\n\nb", "\t\r\n", "\0", "e\u0301", "\ufb01", "\U0001f600", "aaaaa")
MAX_OVERLAPS = 50_000  # for each group of pieces with the same score
RANDOM_TEXTS = 1000  # for each such group


def texts(model: Any) -> list[str]:
    """Every piece, alone and next to symbols; combinations of pieces with the same score; and HARD."""
    pieces = [piece.piece for piece in model.pieces]
    probes = itertools.chain(pieces, _next_to_symbols(model, pieces), _ties(model))
    return [*(text.replace(SPACE, " ") for text in probes), *HARD]


def _next_to_symbols(model: Any, pieces: list[str]) -> Iterator[str]:
    rng = random.Random(0)
    if symbols := [piece.piece for piece in model.pieces if piece.type == SYMBOL]:
        yield from (f"{rng.choice(symbols)}{piece}{rng.choice([*symbols, ''])}" for piece in pieces)


def _ties(model: Any) -> Iterator[str]:
    """Pieces with the same score, of which SentencePiece merges the first, the library the lowest id."""
    if model.trainer_spec.model_type != BPE:
        return
    pieces_by_score: dict[float, dict[str, None]] = {}
    for score, i, *_ in merges(model):
        pieces_by_score.setdefault(score, {})[model.pieces[i].piece] = None
    for group in map(list, pieces_by_score.values()):
        if len(group) > 1:
            yield from _combinations(group)


def _combinations(group: list[str]) -> Iterator[str]:
    """Runs of a character whose runs are pieces, pairs of pieces that overlap, and random concatenations."""
    rng, rests, longest = random.Random(0), dict[str, list[str]](), max(map(len, group))
    for char in {piece[0]: None for piece in group if piece == piece[0] * len(piece)}:
        yield from (f"{prefix}{char * n}" for n in range(1, 4 * longest) for prefix in ("", "a"))
    for piece in group:
        for cut in range(1, len(piece)):
            rests.setdefault(piece[:cut], []).append(piece[cut:])
    overlaps = (
        piece + rest
        for piece in rng.sample(group, len(group))
        for cut in range(1, len(piece))
        for rest in rests.get(piece[cut:], ())
    )
    yield from itertools.islice(overlaps, MAX_OVERLAPS)
    for _ in range(RANDOM_TEXTS):
        yield "".join(rng.choices(group, k=rng.randint(2, 9)))
