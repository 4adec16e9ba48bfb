"""Token-weighted loss and perplexity of a model over batches."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax

from relora_jax.data.batches import Batch
from relora_jax.training.program import Program
from relora_jax.training.steps import TrainState

_AHEAD = 8  # batches whose sums are not waited for: all of a large split would not fit on the devices


class Evaluation(NamedTuple):
    """Mean nats per counted target, exp of it, and how many targets were counted."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(program: Program, state: TrainState, batches: Iterable[Batch]) -> Evaluation:
    """Summed nats / counted targets over all batches: a short or padded batch weighs what it holds.

    Of the state only trained and frozen are looked at.
    """
    sums = []
    for batch in batches:
        sums.append(program.eval_step(state, batch))
        jax.block_until_ready(sums[-_AHEAD:][0])  # the one so many before, or the first
    tokens = sum(int(count) for _, count in sums)
    loss = math.fsum(float(nats) for nats, _ in sums) / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)) if loss == loss else math.nan, tokens)
