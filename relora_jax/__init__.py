"""ReLoRA pretraining (arXiv 2307.05695) in JAX and Flax: the parts to take into a model of one's own.

Each is imported when it is first asked for: commands and worker processes that only read text need no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relora_jax.low_rank import (
        BaseKernel,
        LowRankDense,
        merge_and_reinit,
        unwrap,
        with_dropout_keys,
        wrap,
    )
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
_HOMES = {
    "low_rank": ("BaseKernel", "LowRankDense", "merge_and_reinit", "unwrap", "with_dropout_keys", "wrap"),
    "optimizer": ("ResetState", "group_labels", "reset", "with_reset"),
    "prune": ("Prune", "magnitude", "none", "random", "zero"),
    "schedule": ("is_merge", "is_reset", "multiplier"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
