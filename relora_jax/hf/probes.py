"""Texts in which a SentencePiece model and a tokenizer made of it differ, if they ever do."""

import itertools
import random
from collections.abc import Iterator
from typing import Any

from relora_jax.hf.sentencepiece_json import BPE, SPACE, SYMBOL, merges

HARD = ("", " ", "  a  b ", "a\n\n\nb", "\t\r\n", "\0", "e\u0301", "\ufb01", "\U0001f600", "aaaaa")
OVERLAPS = 50_000  # of pieces of one score that are tried, of as many as there may be
MIXED = 1000  # texts of such pieces, side by side at random


def texts(model: Any) -> list[str]:
    """Every piece's own text and name, beside symbols too; where pieces of one score meet; and HARD."""
    pieces = [piece.piece for piece in model.pieces]
    found = itertools.chain(pieces, _beside_symbols(model, pieces), _ties(model))
    return [*(text.replace(SPACE, " ") for text in found), *HARD]


def _beside_symbols(model: Any, pieces: list[str]) -> Iterator[str]:
    chance = random.Random(0)
    if symbols := [piece.piece for piece in model.pieces if piece.type == SYMBOL]:
        yield from (f"{chance.choice(symbols)}{piece}{chance.choice([*symbols, ''])}" for piece in pieces)


def _ties(model: Any) -> Iterator[str]:
    """Of a BPE model: SentencePiece joins the first of equal scores, the library the one of lowest rank."""
    if model.trainer_spec.model_type != BPE:
        return
    tied: dict[float, dict[str, None]] = {}
    for score, i, *_ in merges(model):
        tied.setdefault(score, {})[model.pieces[i].piece] = None
    for group in map(list, tied.values()):
        if len(group) > 1:
            yield from _meetings(group)


def _meetings(group: list[str]) -> Iterator[str]:
    """Runs of a sign that pieces are runs of, a piece's end that begins another, any side by side."""
    chance, begins, longest = random.Random(0), dict[str, list[str]](), max(map(len, group))
    for sign in {piece[0]: None for piece in group if piece == piece[0] * len(piece)}:
        yield from (f"{before}{sign * n}" for n in range(1, 4 * longest) for before in ("", "a"))
    for piece in group:
        for cut in range(1, len(piece)):
            begins.setdefault(piece[:cut], []).append(piece[cut:])
    overlaps = (
        piece + rest
        for piece in chance.sample(group, len(group))
        for cut in range(1, len(piece))
        for rest in begins.get(piece[cut:], ())
    )
    yield from itertools.islice(overlaps, OVERLAPS)
    for _ in range(MIXED):
        yield "".join(chance.choices(group, k=chance.randint(2, 9)))
