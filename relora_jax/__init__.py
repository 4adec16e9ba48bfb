"""ReLoRA pretraining (arXiv 2307.05695) in JAX and Flax: the parts to take into a model of one's own.

Each is imported when it is first asked for: commands and worker processes that only read text need no JAX.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {  # name: the module of `core` that has it
    "LowRankDense": "low_rank",  # x @ W + scale * (x @ A) @ B, W frozen
    "BaseKernel": "low_rank",  # the type of a frozen variable
    "wrap": "low_rank",  # a model's nnx.Linears -> LowRankDense, in place
    "unwrap": "low_rank",  # and back, factors merged
    "merge_and_reinit": "low_rank",  # the weights' half of a restart
    "with_dropout_keys": "low_rank",  # dropout in models whose calls hand no key on
    "with_reset": "reset",  # any optax transformation -> one whose factors can forget
    "reset": "reset",  # the optimizer's half of a restart
    "ResetState": "reset",  # what with_reset keeps
    "group_labels": "reset",  # "factors" and "rest", for optax.partition
    "Prune": "prune",  # which moments survive a reset:
    "zero": "prune",  # none of them
    "magnitude": "prune",  # the largest
    "random": "prune",  # some, drawn
    "none": "prune",  # all
    "multiplier": "schedule",  # the jagged schedule
    "is_merge": "schedule",  # whether an update begins with a merge
    "is_reset": "schedule",  # and with a reset
}
__all__ = list(_PUBLIC)  # pyright: ignore

if TYPE_CHECKING:  # what a type checker sees
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
