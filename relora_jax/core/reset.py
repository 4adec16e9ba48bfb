"""`with_reset` and `reset`: resettable optimizer statistics for low-rank factors.

`with_reset` wraps any optax transformation and can be nested like any other; `reset` is a function of the
optimizer's state, called at a restart. Shapes: [*layers, m, n] a factor or one of its statistics.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from relora_jax.core import moments
from relora_jax.core.low_rank import LowRankFactor
from relora_jax.core.paths import Path, is_variable, leaves, map_leaves, names, path_key, value_of, with_value
from relora_jax.core.prune import Prune

IsFactor = Callable[[Path, Any], bool]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResetState:
    """The inner state, plus static data: the prune choice, and the (path, shape) of every factor."""

    inner_state: Any
    prune: Prune = dataclasses.field(metadata={"static": True})
    reset_count: bool = dataclasses.field(metadata={"static": True})
    factors: tuple[tuple[Path, tuple[int, ...]], ...] = dataclasses.field(metadata={"static": True})


def is_low_rank_factor(path: Path, leaf: Any) -> bool:
    """Whether the leaf is a `LowRankFactor`, a factor of a `LowRankDense`."""
    return isinstance(leaf, LowRankFactor)


def with_reset(
    inner: optax.GradientTransformation,
    *,
    prune: Prune,
    reset_count: bool = False,
    is_factor: IsFactor = is_low_rank_factor,
) -> optax.GradientTransformationExtraArgs:
    """Wraps `inner`: the same updates, with a state in which `reset` can prune the factors' statistics.

    `is_factor(path, leaf)` is called once per parameter, in `init`. `reset_count=True` also sets the factors'
    count to 0; it requires `prune=zero()` and a separate group for the factors (`optax.partition`).
    ValueError, at construction or in `init`, for options or optimizer states that `reset` does not support.
    """
    check(prune, reset_count=reset_count)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        flat = leaves(params)
        factors = tuple(
            (path, tuple(jnp.shape(value_of(leaf)))) for path, leaf in flat if is_factor(path, leaf)
        )
        state = ResetState(inner.init(params), prune, reset_count, factors)
        _check_state(state, {path for path, _ in flat})
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        return updates, dataclasses.replace(state, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check(prune: Prune, *, reset_count: bool) -> None:
    """Raises ValueError, starting with the argument's name, if the two options are incompatible."""
    if reset_count and not prune.keeps_nothing:
        raise ValueError(
            f"reset_count needs prune=zero: statistics that survive {prune} depend on their count"
        )


def reset(opt_state: Any, key: jax.Array) -> Any:
    """The optimizer state with the factors' statistics pruned; everything else is bitwise unchanged.

    Finds every `with_reset` state in the tree. Each factor gets one mask per layer, computed from its first
    moment (or else its first statistic) and applied to all statistics of the factor's shape; those of
    another shape (rows and columns of a factored second moment) are zeroed, and so are the gradients of the
    old factors that an `optax.MultiSteps` around `with_reset` has accumulated. ValueError if there is nothing
    to reset, or if a transformation around `with_reset` stores anything else of a factor: a momentum, an
    average, a copy.
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_reset_state) if _is_reset_state(s)]
    if not states:
        raise ValueError("no with_reset state found: wrap the optimizer in with_reset(...)")
    if not any(True for state in states for _ in _statistics(state)):
        raise ValueError(
            "no statistics of a factor found: is_factor selected nothing, or the optimizer keeps none"
        )
    factors = {path for state in states for path, _ in state.factors}

    def reset_node(path: Any, node: Any) -> Any:
        stored = () if _is_reset_state(node) else factors
        owner = moments.owner_outside(opt_state, names(path), node, stored)
        if _is_reset_state(node) and not owner:
            return _reset(node, key)
        if owner.endswith("MultiStepsState.acc_grads"):
            return with_value(node, jnp.zeros_like(value_of(node)))
        if owner:
            raise ValueError(
                f"reset does not support {owner}, which stores something of a factor around with_reset: use "
                "another transformation, or put with_reset around a momentum or an average"
            )
        return node

    def is_node(node: Any) -> bool:
        return _is_reset_state(node) or moments.is_known(node) or is_variable(node)

    return jax.tree_util.tree_map_with_path(reset_node, opt_state, is_leaf=is_node)


def live_moments(opt_state: Any) -> jax.Array:
    """How many entries of the factors' first moments are not 0, over all `with_reset` states."""
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_reset_state) if _is_reset_state(s)]
    counts = [jnp.count_nonzero(leaf) for s in states for is_first, _, leaf in _statistics(s) if is_first]
    return jnp.sum(jnp.stack(counts)) if counts else jnp.zeros((), jnp.int32)


def group_labels(params: Any, is_factor: IsFactor = is_low_rank_factor) -> Any:
    """A tree with the label "factors" or "rest" for each parameter, for `optax.partition`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "factors" if is_factor(names(path), leaf) else "rest",
        params,
        is_leaf=is_variable,
    )


def _reset(state: ResetState, key: jax.Array) -> ResetState:
    """One `with_reset` state with its factors' statistics pruned, and their count zeroed if configured."""
    if not state.prune.clears:
        return state
    shapes, basis = dict(state.factors), {}
    for is_first_moment, path, leaf in _statistics(state):
        if leaf.shape == shapes[path] and (path not in basis or (is_first_moment and not basis[path][0])):
            basis[path] = (is_first_moment, leaf)
    masks = {path: _mask(leaf, state.prune, path_key(key, path)) for path, (_, leaf) in basis.items()}

    def prune_leaf(path: Path, leaf: Any) -> Any:
        if path not in shapes:
            return leaf
        value = value_of(leaf)
        mask = masks[path] if value.shape == shapes[path] else False
        return with_value(leaf, jnp.where(mask, value, jnp.zeros_like(value)))

    def prune_state(node: Any) -> Any:
        fields = moments.fields_of(node)
        if fields is None:
            return node
        changes = {name: map_leaves(prune_leaf, getattr(node, name)) for name in fields.statistics}
        if state.reset_count and fields.count and any(True for _ in moments.statistics(node, shapes)):
            count = getattr(node, fields.count)
            changes[fields.count] = with_value(count, jnp.zeros_like(value_of(count)))
        return node._replace(**changes)

    inner_state = jax.tree.map(prune_state, state.inner_state, is_leaf=moments.is_known)
    return dataclasses.replace(state, inner_state=inner_state)


def _mask(statistic: jax.Array, prune: Prune, key: jax.Array) -> jax.Array:
    """True for the entries of a factor that survive; each layer is pruned separately."""
    layers = statistic.reshape(-1, math.prod(statistic.shape[-2:]))
    return prune.mask(layers, key).reshape(statistic.shape)


def _statistics(state: ResetState) -> Iterator[tuple[bool, Path, jax.Array]]:
    """(is first moment, path of the factor, statistic) for every statistic of a factor, in flatten order."""
    shapes = dict(state.factors)
    for node in moments.states(state.inner_state):
        yield from moments.statistics(node, shapes)


def _check_state(state: ResetState, params: set[Path]) -> None:
    """Raises ValueError if a reset of this state could not work."""
    factors = dict(state.factors)
    nodes = jax.tree.leaves(state.inner_state, is_leaf=_is_reset_state)
    if any(_is_reset_state(node) for node in nodes):
        raise ValueError("with_reset inside with_reset: use only one, the outer one reaches every state")
    moments.check_states(state.inner_state, factors=factors, params=params)
    if state.reset_count:
        moments.check_count(state.inner_state, factors=factors)


def _is_reset_state(node: Any) -> bool:
    return isinstance(node, ResetState)
