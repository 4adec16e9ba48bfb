"""Fixed prompts from held-out rows, continued at each evaluation so that people can read what was learned.

Prompts and random keys are the same each time: only the model differs between two evaluations.
"""

from itertools import pairwise

import numpy as np
from jaxtyping import Int32

from relora_jax.config import SAMPLE_TEMPERATURE, SAMPLE_TOP_P
from relora_jax.data.rows import RowStore
from relora_jax.model.sampling import Request, prompt_rows, split_text
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState

COUNT, SEED = 3, 0
PROMPT, CONTINUATION = 16, 48  # maximum lengths, in ids
_SCANNED_ROWS = 64


class EvalPrompts:
    """Prompts from the first rows of `store`."""

    def __init__(self, store: RowStore, tokenizer: Tokenizer) -> None:
        length = store.sequence_length
        prompts = select_prompts(store, count=COUNT, length=min(PROMPT, max(length // 2, 1)))
        ids, lengths = prompt_rows(prompts, size=min(PROMPT + CONTINUATION, length + 1))
        self._decode = tokenizer.decode
        self._request = Request(
            ids=ids,
            lengths=lengths,
            numbers=np.arange(len(prompts), dtype=np.int32),
            seed=SEED,
            max_tokens=CONTINUATION,
            temperature=SAMPLE_TEMPERATURE,
            top_p=SAMPLE_TOP_P,
            vocab_size=tokenizer.vocab_size,
            eos=np.array([tokenizer.eos], np.int32),
            pad=tokenizer.pad,
        )

    def continuations(self, program: Program, state: TrainState) -> list[tuple[str, str]]:
        """(prompt, continuation) of each prompt, as text; uses only the model of the state."""
        if not len(self._request.ids):
            return []
        ids, ends = map(np.asarray, program.sample(state, self._request))
        rows = zip(ids, ends, self._request.lengths, strict=True)
        return [split_text(self._decode, row[:end], prompt=int(length)) for row, end, length in rows]


def select_prompts(store: RowStore, *, count: int, length: int) -> list[Int32[np.ndarray, " _"]]:
    """The `count` longest prompts: up to `length` ids of the first document in each of the first rows."""
    ids, lengths = store.read(range(min(store.rows, _SCANNED_ROWS)))
    rows = [_first_document(row[:end], store.eos) for row, end in zip(ids, lengths, strict=True)]
    return sorted((row[:length] for row in rows if len(row)), key=len, reverse=True)[:count]


def _first_document(ids: np.ndarray, eos: int) -> np.ndarray:
    """The ids before the first EOS, skipping any EOS at the start (the end of an earlier row's document)."""
    ends = [-1, *np.flatnonzero(ids == eos), len(ids)]
    return next((ids[a + 1 : b] for a, b in pairwise(ends) if b > a + 1), ids[:0])
