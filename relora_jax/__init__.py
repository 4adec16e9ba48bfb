"""ReLoRA pretraining (arXiv 2307.05695) in JAX and Flax: the parts to take into a model of one's own."""

from relora_jax.low_rank import BaseKernel, LowRankDense, merge_and_reinit, unwrap, with_dropout_keys, wrap
from relora_jax.optimizer import ResetState, group_labels, reset, with_reset
from relora_jax.prune import Prune, magnitude, none, random, zero
from relora_jax.schedule import is_merge, is_reset, multiplier

__all__ = [
    "BaseKernel",
    "LowRankDense",
    "Prune",
    "ResetState",
    "group_labels",
    "is_merge",
    "is_reset",
    "magnitude",
    "merge_and_reinit",
    "multiplier",
    "none",
    "random",
    "reset",
    "unwrap",
    "with_dropout_keys",
    "with_reset",
    "wrap",
    "zero",
]
