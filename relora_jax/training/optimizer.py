"""The optimizer in two groups, factors and rest, with the learning rate as an argument of each update."""

import itertools
from typing import Any

import jax
import optax

from relora_jax.core.paths import is_variable, leaves, names
from relora_jax.core.prune import Prune, none
from relora_jax.core.reset import group_labels, with_reset
from relora_jax.training import optimizers


def make_optimizer(
    params: Any,
    *,
    name: str = "adamw",
    kernel_lr_ratio: float = 1.0,
    prune: Prune = none(),  # noqa: B008 (a frozen value)
    reset_count: bool = False,
    factor_lr_ratio: float = 1.0,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformationExtraArgs:
    """AdamW for `params`, in the groups "factors" and "rest", clipped by the global norm over both.

    `name`, in the grammar of optimizers.py, replaces Adam's scaling of the rest.
    `update(grads, state, params, learning_rate=...)`; the factors' rate is factor_lr_ratio times that, and
    the rate of the blocks' kernels in the group "rest" kernel_lr_ratio times that.
    Weight decay is decoupled, scaled by the rate of each, and on all but the norms. clip_norm=0: no clipping.
    """
    decay = [optax.add_decayed_weights(weight_decay, mask=_decays)] if weight_decay else []
    of_kernels = [optax.masked(optax.scale(kernel_lr_ratio), _kernels)] if kernel_lr_ratio != 1 else []
    adam = optax.scale_by_adam(b1, b2, eps)
    rest = optimizers.parse(name).scaling(params, adam)
    groups: Any = {
        "factors": optax.chain(adam, *decay, scale_by_rate(-factor_lr_ratio)),
        "rest": optax.chain(rest, *decay, *of_kernels, scale_by_rate(-1.0)),
    }
    groups = optax.partition(groups, group_labels(params))
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return with_reset(optax.chain(*clip, groups), prune=prune, reset_count=reset_count)


def scale_by_rate(factor: float) -> optax.GradientTransformationExtraArgs:
    """Scales updates by factor * learning_rate, an argument of `update`: no schedule keeps its own count."""

    def update(
        updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any
    ) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: (factor * learning_rate) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # pyright: ignore


def carry_over_rest(new: Any, old: Any) -> Any:
    """`new` with the moments (matched by path) and the count of the group "rest" copied from `old`."""
    rest = ("inner_states", "rest")
    rest_leaves = {path: leaf for path, leaf in leaves(old) if rest in itertools.pairwise(path)}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: rest_leaves.get(names(path), leaf), new, is_leaf=is_variable
    )


def _kernels(params: Any) -> Any:
    """Whether a variable is a kernel of the blocks."""
    return jax.tree.map(optimizers.is_kernel, params, is_leaf=is_variable)


def _decays(params: Any) -> Any:
    """Whether a variable decays, from its named axes."""
    return jax.tree.map(lambda leaf: "norm" not in getattr(leaf, "axes", ()), params, is_leaf=is_variable)
