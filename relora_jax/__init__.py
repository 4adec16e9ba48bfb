"""ReLoRA pretraining (arXiv 2307.05695) in JAX and Flax: functions and classes to use with your own model.

Names are imported lazily, so that commands and worker processes that only read text do not import JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {  # name: the module of `core` that defines it
    "LowRankDense": "low_rank",  # x @ W + scale * (x @ A) @ B, W frozen
    "BaseKernel": "low_rank",  # the nnx.Variable type of frozen kernels
    "FrozenFactor": "low_rank",  # the nnx.Variable type of an A that is not trained
    "BaseMaster": "low_rank",  # the nnx.Variable type of W in float32 beside a kernel in fewer bits
    "LowRankFactor": "low_rank",  # the nnx.Variable type of the factors, which a restart merges and resets
    "wrap": "low_rank",  # replaces a model's linear layers by LowRankDense, in place
    "unwrap": "low_rank",  # the inverse, with the factors merged
    "merge_and_reinit": "low_rank",  # a restart's effect on the weights
    "take_masters": "low_rank",  # takes these out of the model between merges
    "give_masters": "low_rank",  # the inverse
    "with_dropout_keys": "low_rank",  # dropout in models that do not pass keys to their layers
    "with_reset": "reset",  # makes the factors' statistics of any optax transformation resettable
    "reset": "reset",  # a restart's effect on the optimizer state
    "ResetState": "reset",  # the state of with_reset
    "group_labels": "reset",  # "factors" and "rest", for optax.partition
    "Prune": "prune",  # which moments survive a reset:
    "zero": "prune",  # none of them
    "magnitude": "prune",  # the largest
    "random": "prune",  # a random choice
    "none": "prune",  # all
    "multiplier": "schedule",  # the jagged schedule
    "is_merge": "schedule",  # whether an update begins with a merge
    "is_reset": "schedule",  # whether an update begins with a reset
}
__all__ = list(_PUBLIC)  # pyright: ignore

if TYPE_CHECKING:  # eager imports for type checkers
    from relora_jax.core.low_rank import *  # noqa: F403
    from relora_jax.core.prune import *  # noqa: F403
    from relora_jax.core.reset import *  # noqa: F403
    from relora_jax.core.schedule import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.core.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
