"""Token-weighted loss and perplexity over batches, of a model and of a unigram baseline."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int64

from relora_jax.data.batches import Batch
from relora_jax.model.loss import counted_targets
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState

_MAX_QUEUED = 8  # batches: those of a whole large split would not fit on the devices


class Evaluation(NamedTuple):
    """Mean nats per counted target, its exponential, and the number of counted targets."""

    loss: float
    perplexity: float
    tokens: int


def evaluate(program: Program, state: TrainState, batches: Iterable[Batch]) -> Evaluation:
    """Summed nats / counted targets over all batches, so that short or padded batches weigh less.

    Uses only the model of the state. Without any counted target, loss and perplexity are NaN.
    """
    sums = []
    for batch in batches:
        sums.append(program.eval_step(state, batch))
        jax.block_until_ready(sums[-_MAX_QUEUED:][0])
    tokens = sum(int(count) for _, count in sums)
    loss = math.fsum(float(nats) for nats, _ in sums) / tokens if tokens else math.nan
    return Evaluation(loss, math.exp(min(loss, 700.0)) if loss == loss else math.nan, tokens)


def unigram_perplexity(counts: Int64[np.ndarray, " pieces"], batches: Iterable[Batch]) -> float:
    """exp(mean of -log((c + 1) / sum(c + 1)) over the counted targets), with the `counts` c of each piece.

    The perplexity of a model that knows the frequency of each piece but ignores the context.
    """
    targets = np.zeros(len(counts), np.int64)
    for batch in batches:
        ids, lengths, segment_ids = multihost_utils.process_allgather(batch, tiled=True)
        counted = counted_targets(ids, lengths, segment_ids)
        targets += np.bincount(ids[..., 1:][counted], minlength=len(counts))
    smoothed = counts.astype(np.float64) + 1
    nats = -np.log(smoothed / smoothed.sum())
    return float(np.exp(targets @ nats / targets.sum()))
