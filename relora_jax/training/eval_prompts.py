"""Beginnings of held-out rows that a run continues at each evaluation, for people to read what it has learnt.

The same beginnings and the same chances each time: what differs between two evaluations is the model.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Int32

from relora_jax.config import SAMPLE_TEMPERATURE, SAMPLE_TOP_P
from relora_jax.data.rows import RowStore
from relora_jax.model.sampling import Request, in_text, windows
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState

COUNT, SEED = 3, 0
PROMPT, CONTINUATION = 16, 48  # ids at most
_LOOKED_AT = 64  # rows


class EvalPrompts:
    """Some of the rows of `store` as prompts."""

    def __init__(self, store: RowStore, tokenizer: Tokenizer) -> None:
        length = store.sequence_length
        prompts = begun(store, count=COUNT, length=min(PROMPT, max(length // 2, 1)))
        ids, lengths = windows(prompts, size=min(PROMPT + CONTINUATION, length + 1))
        self._decode = tokenizer.decode
        self._asked = Request(
            ids=ids,
            lengths=lengths,
            numbers=np.arange(len(prompts), dtype=np.int32),
            seed=SEED,
            max_tokens=CONTINUATION,
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            vocab_size=tokenizer.vocab_size,
            eos=tokenizer.eos,
            pad=tokenizer.pad,
        )

    def continued(self, program: Program, state: TrainState) -> list[tuple[str, str]]:
        """(prompt, continuation) of each; only trained and frozen of the state are looked at."""
        if not len(self._asked.ids):
            return []
        ids, ends = map(np.asarray, program.sample(state, self._asked))
        rows = zip(ids, ends, self._asked.lengths, strict=True)
        return [in_text(self._decode, row[:end], prompt=int(length)) for row, end, length in rows]


def begun(store: RowStore, *, count: int, length: int) -> list[Int32[np.ndarray, " _"]]:
    """At most `length` ids of the first document in each of the first rows; `count` such, longest first."""
    ids, lengths = store.read(range(min(store.rows, _LOOKED_AT)))
    rows = [_first_document(row[:end], store.eos) for row, end in zip(ids, lengths, strict=True)]
    return sorted((row[:length] for row in rows if len(row)), key=len, reverse=True)[:count]


def _first_document(ids: np.ndarray, eos: int) -> np.ndarray:
    """The ids before the first EOS; one at the very beginning ends what lies in the row before."""
    ends = [-1, *np.flatnonzero(ids == eos), len(ids)]
    return next((ids[a + 1 : b] for a, b in pairwise(ends) if b > a + 1), ids[:0])
