"""`with_reset` and `reset`: an optimizer whose factors can forget.

`with_reset` wraps any optax transformation and stands wherever one can; `reset` is a function of the
optimizer's state, called at a restart. Shapes: [*layers, m, n] a factor or a statistic of it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from relora_jax.core import moments
from relora_jax.core.paths import Path, is_variable, leaves, map_leaves, names, path_key, value_of, with_value
from relora_jax.core.prune import Prune

IsFactor = Callable[[Path, Any], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResetState:
    """The wrapped state; statically, how it is pruned and the (path, shape) of every factor."""

    inner_state: Any
    prune: Prune = dataclasses.field(metadata={"static": True})
    reset_count: bool = dataclasses.field(metadata={"static": True})
    factors: tuple[tuple[Path, tuple[int, ...]], ...] = dataclasses.field(metadata={"static": True})


def is_low_rank_factor(path: Path, leaf: Any) -> bool:
    """Whether the leaf is an `nnx.LoRAParam`."""
    return isinstance(leaf, nnx.LoRAParam)


def with_reset(
    inner: optax.GradientTransformation,
    *,
    prune: Prune,
    reset_count: bool = False,
    is_factor: IsFactor = is_low_rank_factor,
) -> optax.GradientTransformationExtraArgs:
    """The updates of `inner`, in a state whose statistics of the factors `reset` can prune.

    `is_factor(path, leaf)` is asked once per parameter, at `init`. `reset_count` also sets the factors'
    count to 0 and asks for `prune=zero()` and a group of the factors' own (`optax.partition`). ValueError at
    construction or `init`, by name, for statistics that a reset would not understand.
    """
    check(prune, reset_count=reset_count)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        found = leaves(params)
        factors = tuple(
            (path, tuple(jnp.shape(value_of(leaf)))) for path, leaf in found if is_factor(path, leaf)
        )
        state = ResetState(inner.init(params), prune, reset_count, factors)
        _refuse(state, {path for path, _ in found})
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        return updates, dataclasses.replace(state, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check(prune: Prune, *, reset_count: bool) -> None:
    """ValueError, which begins with the argument's name, where the two do not go together."""
    if reset_count and not prune.keeps_nothing:
        raise ValueError(f"reset_count needs prune=zero: what survives {prune} is corrected by its count")


def reset(opt_state: Any, key: jax.Array) -> Any:
    """The state with the factors' statistics pruned; everything else is bitwise as it was.

    Finds the states of `with_reset` anywhere in a tree. Per factor and layer one mask, made from its first
    moment (else from its first statistic), prunes all statistics of its shape; statistics of another shape
    (rows and columns of a factored second moment) are zeroed. ValueError where there is nothing to reset.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_reset_state) if _is_reset_state(s)]
    if not found:
        raise ValueError("reset found no state of with_reset: wrap the optimizer in with_reset(...)")
    if not any(True for state in found for _ in _statistics(state)):
        raise ValueError(
            "reset found no statistics of a factor: is_factor picked nothing, or the optimizer keeps none"
        )
    return jax.tree.map(
        lambda s: _reset(s, key) if _is_reset_state(s) else s, opt_state, is_leaf=_is_reset_state
    )


def group_labels(params: Any, is_factor: IsFactor = is_low_rank_factor) -> Any:
    """The label "factors" or "rest" in the place of each parameter, for `optax.partition`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "factors" if is_factor(names(path), leaf) else "rest",
        params,
        is_leaf=is_variable,
    )


def _reset(state: ResetState, key: jax.Array) -> ResetState:
    """One state of `with_reset` with its factors' statistics pruned, and their count zeroed if asked."""
    if not state.prune.clears:
        return state
    shapes, basis = dict(state.factors), {}
    for first, path, leaf in _statistics(state):
        if leaf.shape == shapes[path] and (path not in basis or (first and not basis[path][0])):
            basis[path] = (first, leaf)
    masks = {path: _mask(leaf, state.prune, path_key(key, path)) for path, (_, leaf) in basis.items()}

    def prune_leaf(path: Path, leaf: Any) -> Any:
        if path not in shapes:
            return leaf
        value = value_of(leaf)
        mask = masks[path] if value.shape == shapes[path] else False
        return with_value(leaf, jnp.where(mask, value, jnp.zeros_like(value)))

    def prune_state(node: Any) -> Any:
        kept = moments.known(node)
        if kept is None:
            return node
        fields = {name: map_leaves(prune_leaf, getattr(node, name)) for name in kept.fields}
        if state.reset_count and kept.count and any(True for _ in moments.statistics(node, shapes)):
            count = getattr(node, kept.count)
            fields[kept.count] = with_value(count, jnp.zeros_like(value_of(count)))
        return node._replace(**fields)

    inner = jax.tree.map(prune_state, state.inner_state, is_leaf=lambda n: moments.known(n) is not None)
    return dataclasses.replace(state, inner_state=inner)


def _mask(statistic: jax.Array, prune: Prune, key: jax.Array) -> jax.Array:
    """True where an entry of a factor survives; each layer is pruned by itself."""
    layers = statistic.reshape(-1, math.prod(statistic.shape[-2:]))
    return prune.mask(layers, key).reshape(statistic.shape)


def _statistics(state: ResetState) -> Iterator[tuple[bool, Path, jax.Array]]:
    """(is it a first moment, factor's path, statistic) for every statistic of a factor, in flatten order."""
    shapes = dict(state.factors)
    for node in moments.states(state.inner_state):
        yield from moments.statistics(node, shapes)


def _refuse(state: ResetState, params: set[Path]) -> None:
    """ValueError, by name, for what a reset of this state could not do as it should."""
    factors = dict(state.factors)
    nested = jax.tree.leaves(state.inner_state, is_leaf=_is_reset_state)
    if any(_is_reset_state(node) for node in nested):
        raise ValueError("with_reset inside with_reset: one is enough, the outer one reaches every state")
    moments.refuse_unknown(state.inner_state, factors=factors, params=params)
    if state.reset_count:
        moments.refuse_shared_count(state.inner_state, factors=factors)


def _is_reset_state(node: Any) -> bool:
    return isinstance(node, ResetState)
