"""Token-weighted loss and perplexity over a fixed budget of tokens of a fixed validation stream."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from relora_jax.data import Batch
from relora_jax.program import Program
from relora_jax.steps import TrainState


class Evaluation(NamedTuple):
    """Mean nats per counted target, exp of it, and how many targets were counted."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(program: Program, state: TrainState, batches: Iterable[Batch]) -> Evaluation:
    """Summed nats / counted targets over all batches: a short or padded batch weighs what it holds."""
    sums = [program.eval_step(state, batch) for batch in batches]
    tokens = sum(int(count) for _, count in sums)
    loss = math.fsum(float(nats) for nats, _ in sums) / tokens
    return Evaluation(loss, math.exp(min(loss, 700.0)) if loss == loss else math.nan, tokens)
