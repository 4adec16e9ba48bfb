"""AdamW in two groups, factors and rest, and `with_reset`: an optimizer whose factors can forget.

`with_reset` wraps any optax transformation and stands wherever one can; `reset` is a function of the
optimizer's state, called at a restart. Shapes: [*layers, m, n] a factor or a statistic of it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from relora_jax.low_rank import Path, path_key
from relora_jax.prune import Prune, none

IsFactor = Callable[[Path, Any], bool]


class _Statistics(NamedTuple):
    """Which fields of a state mirror the parameters (the first moment, if any, first), and its count."""

    fields: tuple[str, ...]
    first_moment: str = ""
    count: str = ""


# What optax keeps for a parameter, by the name of the state's class. A class that is not here may hold
# anything (parameters, accumulated gradients), so `with_reset` refuses it where it holds a factor.
_UNDERSTOOD = {
    "ScaleByAdamState": _Statistics(("mu", "nu"), "mu", "count"),
    "ScaleByAmsgradState": _Statistics(("mu", "nu", "nu_max"), "mu", "count"),
    "ScaleByBeliefState": _Statistics(("mu", "nu"), "mu", "count"),
    "ScaleByLionState": _Statistics(("mu",), "mu", "count"),
    "ScaleByRmsState": _Statistics(("nu",)),
    "ScaleByRmsWithCountState": _Statistics(("nu",), "", "count"),
    "ScaleByRStdDevState": _Statistics(("mu", "nu"), "mu"),
    "ScaleByRStdDevWithCountState": _Statistics(("mu", "nu"), "mu", "count"),
    "ScaleByRssState": _Statistics(("sum_of_squares",)),
    "ScaleByAdaDeltaState": _Statistics(("e_g", "e_x")),
    "ScaleByNovogradState": _Statistics(("mu", "nu"), "mu", "count"),
    "FactoredState": _Statistics(("v_row", "v_col", "v"), "", "count"),
    "TraceState": _Statistics(("trace",), "trace"),
    "EmaState": _Statistics(("ema",), "ema", "count"),
    "MuonState": _Statistics(("mu",), "mu", "count"),
}


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
    if reset_count and prune.kind != "zero":
        raise ValueError(f"reset_count needs prune=zero(): what survives {prune} is corrected by its count")
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> Any:
        leaves = _leaves(params)
        factors = tuple(
            (path, tuple(jnp.shape(_value(leaf)))) for path, leaf in leaves if is_factor(path, leaf)
        )
        state = ResetState(inner.init(params), prune, reset_count, factors)
        _refuse_unknown(state, {path for path, _ in leaves})
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        return updates, dataclasses.replace(state, inner_state=inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def reset(opt_state: Any, key: jax.Array) -> Any:
    """The state with the factors' statistics pruned; everything else is bitwise as it was.

    Finds the states of `with_reset` anywhere in a tree. Per factor and layer one mask, made from its first
    moment (else from its first statistic), prunes all statistics of its shape; statistics of another shape
    (rows and columns of a factored second moment) are zeroed. ValueError where there is nothing to reset.
    """
    states = [s for s in jax.tree.leaves(opt_state, is_leaf=_is_reset_state) if _is_reset_state(s)]
    if not states:
        raise ValueError("reset found no state of with_reset: wrap the optimizer in with_reset(...)")
    if not any(True for state in states for _ in _factor_statistics(state)):
        raise ValueError(
            "reset found no statistics of a factor: is_factor picked nothing, or the optimizer keeps none"
        )
    return jax.tree.map(
        lambda s: _reset(s, key) if _is_reset_state(s) else s, opt_state, is_leaf=_is_reset_state
    )


def make_optimizer(
    params: Any,
    *,
    prune: Prune = none(),  # noqa: B008 (a frozen value)
    reset_count: bool = False,
    factor_lr_ratio: float = 1.0,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    clip_norm: float,
) -> optax.GradientTransformationExtraArgs:
    """AdamW of `params`, clipped by the global norm of all, in the groups "factors" and "rest".

    `update(grads, state, params, rate=...)` takes the update's rate; factors take factor_lr_ratio times it.
    Decay is decoupled, times the leaf's rate, on matrices only. clip_norm 0 means no clipping.
    """

    def adamw(ratio: float) -> optax.GradientTransformation:
        decay = [optax.add_decayed_weights(weight_decay, mask=_decays)] if weight_decay else []
        return optax.chain(optax.scale_by_adam(b1, b2, eps), *decay, scale_by_rate(-ratio))

    groups = optax.partition({"factors": adamw(factor_lr_ratio), "rest": adamw(1.0)}, group_labels(params))
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return with_reset(optax.chain(*clip, groups), prune=prune, reset_count=reset_count)


def scale_by_rate(factor: float) -> optax.GradientTransformationExtraArgs:
    """Updates times `factor` times the argument `rate` of `update`: no schedule keeps a count of its own."""

    def update(updates: Any, state: Any, params: Any = None, *, rate: Any, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda u: (factor * rate) * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)  # pyright: ignore


def group_labels(params: Any, is_factor: IsFactor = is_low_rank_factor) -> Any:
    """ "factors" or "rest" in the place of each parameter, for `optax.partition`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "factors" if is_factor(_names(path), leaf) else "rest",
        params,
        is_leaf=_is_variable,
    )


def keep_rest(new: Any, old: Any) -> Any:
    """`new` with what the group "rest" of `old` knows: moments by their paths, and the count."""
    known = {path: leaf for path, leaf in _leaves(old) if "rest" in path}
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: known.get(_names(path), leaf), new, is_leaf=_is_variable
    )


def _decays(params: Any) -> Any:
    def is_matrix(leaf: Any) -> bool:
        return leaf.ndim - getattr(leaf, "axes", ()).count("layers") >= 2

    return jax.tree.map(is_matrix, params, is_leaf=_is_variable)


def _reset(state: ResetState, key: jax.Array) -> ResetState:
    """One state of `with_reset` with its factors' statistics pruned, and their count zeroed if asked."""
    if state.prune.kind == "none":
        return state
    shapes, basis = dict(state.factors), {}
    for first, path, leaf in _factor_statistics(state):
        if leaf.shape == shapes[path] and (path not in basis or (first and not basis[path][0])):
            basis[path] = (first, leaf)
    masks = {path: _mask(leaf, state.prune, path_key(key, path)) for path, (_, leaf) in basis.items()}

    def prune_leaf(path: Path, leaf: Any) -> Any:
        if path not in shapes:
            return leaf
        value = _value(leaf)
        mask = masks[path] if value.shape == shapes[path] else False
        return _with_value(leaf, jnp.where(mask, value, jnp.zeros_like(value)))

    def prune_state(node: Any) -> Any:
        known = _known(node)
        if known is None:
            return node
        fields = {name: _map(prune_leaf, getattr(node, name)) for name in known.fields}
        if state.reset_count and known.count and any(True for _ in _of_factors(node, known, shapes)):
            count = getattr(node, known.count)
            fields[known.count] = _with_value(count, jnp.zeros_like(_value(count)))
        return node._replace(**fields)

    inner = jax.tree.map(prune_state, state.inner_state, is_leaf=lambda n: _known(n) is not None)
    return dataclasses.replace(state, inner_state=inner)


def _mask(statistic: jax.Array, prune: Prune, key: jax.Array) -> jax.Array:
    """True for exactly prune.kept(m n) entries of each layer; of equals the lower index is kept.

    `lax.top_k` per layer: a quantile of a stacked leaf would starve whole layers and miscount ties.
    """
    rows = statistic.reshape(-1, math.prod(statistic.shape[-2:]))
    kept = prune.kept(rows.shape[-1])
    scores = jax.random.uniform(key, rows.shape) if prune.kind == "random" else jnp.abs(rows)
    _, index = jax.lax.top_k(scores, kept)
    mask = jax.vmap(lambda i: jnp.zeros(rows.shape[-1], bool).at[i].set(True))(index)
    return mask.reshape(statistic.shape)


def _factor_statistics(state: ResetState) -> Iterator[tuple[bool, Path, jax.Array]]:
    """(is it a first moment, factor's path, statistic) for every statistic of a factor, in flatten order."""
    shapes = dict(state.factors)
    for node in jax.tree.leaves(state.inner_state, is_leaf=lambda n: _known(n) is not None):
        known = _known(node)
        if known is not None:
            yield from _of_factors(node, known, shapes)


def _of_factors(
    node: Any, known: _Statistics, shapes: dict[Path, Any]
) -> Iterator[tuple[bool, Path, jax.Array]]:
    for name in known.fields:
        for path, leaf in _leaves(getattr(node, name)):
            if path in shapes:
                yield name == known.first_moment, path, _value(leaf)


def _refuse_unknown(state: ResetState, params: set[Path]) -> None:
    """ValueError that names a state whose statistics of a factor, or whose count, a reset cannot treat."""
    shapes = dict(state.factors)
    for path, leaf in _leaves(state.inner_state, stop=lambda n: _known(n) is not None or _is_reset_state(n)):
        if _is_reset_state(leaf):
            raise ValueError("with_reset inside with_reset: one is enough, the outer one reaches every state")
        known = _known(leaf)
        if known is None:
            owner, inside = _owner(state.inner_state, path)
            refused = [owner] if any(_holds(inside, factor) for factor in shapes if factor) else []
        else:  # statistics that do not lie as the parameters do would never be found
            fields = [(name, p) for name in known.fields for p, _ in _leaves(getattr(leaf, name))]
            refused = [_owner(state.inner_state, (*path, name))[0] for name, p in fields if p not in params]
        if shapes and refused:
            raise ValueError(
                f"with_reset does not understand {refused[0]}, which holds something of a factor: "
                "put with_reset inside that transformation, or use another"
            )
        if known is not None and state.reset_count and known.count:
            own = {path for _, path, _ in _of_factors(leaf, known, shapes)}
            others = {path for name in known.fields for path, _ in _leaves(getattr(leaf, name))} - own
            if own and others:
                raise ValueError(
                    f"reset_count would also reset the count of {'/'.join(map(str, min(others, key=str)))}: "
                    "give the factors a group of their own with optax.partition(..., group_labels(params))"
                )


def _owner(node: Any, path: Path) -> tuple[str, Path]:
    """("Outer > Inner.field", rest of the path) of the named tuples on the way along `path`."""
    classes, field, inside = [], "?", path
    for depth, name in enumerate(path):
        if _is_named(node):
            classes.append(type(node).__name__)
            field, inside = name, path[depth + 1 :]
        try:
            named = _is_named(node) or dataclasses.is_dataclass(node)
            node = getattr(node, str(name)) if named else node[name]
        except (AttributeError, LookupError, TypeError):
            break
    return f"{' > '.join(classes) or 'a state'}.{field}", inside


def _holds(path: Path, factor: Path) -> bool:
    """Whether the names of `factor` follow one another somewhere in `path`."""
    return any(path[i : i + len(factor)] == factor for i in range(len(path) - len(factor) + 1))


def _known(node: Any) -> _Statistics | None:
    return _UNDERSTOOD.get(type(node).__name__) if _is_named(node) else None


def _is_named(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _is_reset_state(node: Any) -> bool:
    return isinstance(node, ResetState)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _value(leaf: Any) -> Any:
    return leaf.get_value() if _is_variable(leaf) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if _is_variable(leaf) else value


def _names(path: tuple[Any, ...]) -> Path:
    """Jax's keys as plain names and indices."""
    return tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))) for k in path)


def _leaves(tree: Any, stop: Callable[[Any], bool] = lambda _: False) -> list[tuple[Path, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: _is_variable(n) or stop(n))
    return [(_names(path), leaf) for path, leaf in leaves]


def _map(f: Callable[[Path, Any], Any], tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: f(_names(path), leaf), tree, is_leaf=_is_variable
    )
