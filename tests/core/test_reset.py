"""A reset prunes only the statistics of the factors, in any optimizer; make_optimizer is AdamW."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from relora_jax.core.low_rank import LowRankFactor, merge_and_reinit, wrap
from relora_jax.core.prune import Prune, magnitude, none, random, zero
from relora_jax.core.reset import group_labels, reset, with_reset
from relora_jax.training.optimizer import carry_over_rest, make_optimizer, scale_by_rate

Tree = dict[str, Any]


KEY = jax.random.key(0)
# Stacked and unstacked factors, next to parameters that a reset must not touch. All shapes differ.
SHAPES: Tree = {
    "stack": {"a": (3, 5, 2), "b": (3, 2, 4), "scale": (3, 4)},
    "flat": {"a": (6, 2), "b": (2, 7), "bias": (7,)},
    "head": (4, 9),
}
FACTORS = {"['stack']['a']", "['stack']['b']", "['flat']['a']", "['flat']['b']"}


def is_factor(path: Any, leaf: Any) -> bool:
    return path[-1] in ("a", "b")


def is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and not hasattr(node, "_fields")


def drawn(seed: int = 0, dtype: Any = np.float32) -> Tree:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)


PARAMS = drawn()


def filled(state: Any) -> Any:
    """The state filled with small nonzero numbers: many ties, and layers of different magnitude."""
    rng = np.random.default_rng(1)

    def fill(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.full_like(leaf, 7)
        values = rng.integers(1, 4, leaf.shape) * rng.choice([-1, 1], leaf.shape)
        if leaf.ndim == 3:
            values = values * 10.0 ** np.arange(leaf.shape[0])[:, None, None]
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map(fill, state)


def leaves(state: Any) -> dict[str, np.ndarray]:
    """Every array of a state by its path as text."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def factor_of(path: str) -> str | None:
    return next((factor for factor in FACTORS if path.endswith(factor)), None)


# --- the table: every optimizer, nested in every way, with every prune

# {name: (constructor, the field that determines the mask: first moment, else first statistic)}
OPTIMIZERS: dict[str, tuple[Callable[..., Any], str]] = {
    "adamw": (lambda lr: optax.adamw(lr, weight_decay=0.1), "mu"),
    "lion": (lambda lr: optax.lion(lr), "mu"),
    "rmsprop": (lambda lr: optax.rmsprop(lr), "nu"),
    "rmsprop centred": (lambda lr: optax.rmsprop(lr, centered=True), "mu"),
    "rmsprop with momentum": (lambda lr: optax.rmsprop(lr, momentum=0.9), "trace"),
    "rmsprop centred with momentum": (lambda lr: optax.rmsprop(lr, centered=True, momentum=0.9), "mu"),
    "sgd with momentum": (lambda lr: optax.sgd(lr, momentum=0.9), "trace"),
    "adafactor": (lambda lr: optax.adafactor(lr, min_dim_size_to_factor=2, momentum=0.9), "ema"),
    "adafactor not factored": (lambda lr: optax.adafactor(lr), "v"),
}
LABELS = group_labels(PARAMS, is_factor)
NESTINGS: dict[str, Callable[[Callable[..., Any]], Any]] = {
    "alone": lambda make: make(1e-2),
    "chained": lambda make: optax.chain(optax.clip_by_global_norm(1.0), make(1e-2), optax.ema(0.9)),
    "partitioned": lambda make: optax.partition({"factors": make(1e-2), "rest": optax.adam(1e-2)}, LABELS),
    "masked": lambda make: optax.masked(make(1e-2), jax.tree.map(lambda label: label == "factors", LABELS)),
    "injected": lambda make: optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(1e-2),
}
PRUNES = (magnitude(0.7), random(0.7), zero(), none())
# the fast run: each optimizer once, in the nesting most likely to fail
FAST = [
    ("adamw", "alone", magnitude(0.7)),
    ("lion", "chained", random(0.7)),
    ("rmsprop", "partitioned", zero()),
    ("rmsprop centred", "masked", magnitude(0.7)),
    ("rmsprop with momentum", "injected", magnitude(0.7)),
    ("rmsprop centred with momentum", "alone", random(0.7)),
    ("sgd with momentum", "chained", magnitude(0.7)),
    ("adafactor", "partitioned", magnitude(0.7)),
    ("adafactor", "partitioned", none()),
    ("adafactor not factored", "masked", random(0.7)),
]


def rows() -> list[Any]:
    """All combinations; those not in FAST are marked slow."""
    table = [(name, nesting, prune) for name in OPTIMIZERS for nesting in NESTINGS for prune in PRUNES]
    marks = [() if row in FAST else pytest.mark.slow for row in table]
    return [
        pytest.param(*row, marks=m, id=" ".join(map(str, row))) for row, m in zip(table, marks, strict=True)
    ]


@pytest.mark.parametrize(("name", "nesting", "prune"), rows())
def test_reset_touches_only_factor_moments_and_keeps_exact_counts(
    name: str, nesting: str, prune: Prune
) -> None:
    make, deciding = OPTIMIZERS[name]
    if nesting == "chained" and deciding in ("nu", "v"):
        deciding = "ema"  # the chain adds optax.ema, which is a first moment
    state = filled(with_reset(NESTINGS[nesting](make), prune=prune, is_factor=is_factor).init(PARAMS))
    before, after = leaves(state), leaves(reset(state, KEY))
    assert before.keys() == after.keys()
    paths_of = {factor: [p for p in before if factor_of(p) == factor] for factor in FACTORS}
    assert all(paths_of.values())
    for path, old in before.items():
        assert after[path].dtype == old.dtype
        if factor_of(path) is None or prune.kind == "none":
            np.testing.assert_array_equal(after[path], old, err_msg=path)
    for factor, paths in paths_of.items() if prune.kind != "none" else ():
        check_factor(factor, paths, before, after, deciding, prune)


def check_factor(
    factor: str, paths: list[str], before: Tree, after: Tree, deciding: str, prune: Prune
) -> None:
    """Checks that all statistics of this factor share one mask, of the right size and entries."""
    shape = leaves(PARAMS)[factor].shape
    like = [path for path in paths if before[path].shape == shape]
    assert like
    for path in set(paths) - set(like):
        assert not np.any(after[path]), path
    masks = {path: after[path] != 0 for path in like}
    for path, mask in masks.items():
        np.testing.assert_array_equal(after[path], np.where(mask, before[path], 0), err_msg=path)
        entries = shape[-2] * shape[-1]
        survivors = 0 if prune.kind == "zero" else round((1 - prune.prune_fraction) * entries)
        assert set(mask.reshape(-1, entries).sum(1)) == {survivors}, path
        np.testing.assert_array_equal(mask, next(iter(masks.values())), err_msg=path)
    if prune.kind == "magnitude":
        basis = next(path for path in like if path.endswith(f".{deciding}{factor}"))
        np.testing.assert_array_equal(masks[basis], largest(before[basis], prune.prune_fraction))


def largest(values: np.ndarray, fraction: float) -> np.ndarray:
    """True where |value| is among the largest of its layer; ties go to the lower index."""
    size = np.abs(values).reshape(-1, values.shape[-2] * values.shape[-1])
    survivors = round((1 - fraction) * size.shape[1])
    mask = np.zeros(size.shape, bool)
    for layer, order in enumerate(np.argsort(-size, axis=1, kind="stable")):
        mask[layer, order[:survivors]] = True
    return mask.reshape(values.shape)


def test_equal_moments_keep_the_lower_index() -> None:
    tx = with_reset(optax.adam(1e-2), prune=magnitude(0.75), is_factor=is_factor)
    state = jax.tree.map(jnp.ones_like, tx.init(PARAMS))
    nu = leaves(reset(state, KEY))[".inner_state[0].nu['stack']['a']"].reshape(3, 10)
    np.testing.assert_array_equal(nu, np.broadcast_to(np.arange(10) < round(0.25 * 10), (3, 10)))


def test_random_masks_differ_between_factors_layers_and_keys() -> None:
    shapes = {"x": {"a": (2, 40, 4), "b": (2, 4, 40)}, "y": {"a": (2, 40, 4)}}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=is_shape)
    tx = with_reset(optax.adam(1e-2), prune=random(0.5), is_factor=is_factor)
    state = jax.tree.map(jnp.ones_like, tx.init(params))

    def masks(seed: int) -> np.ndarray:
        moments = reset(state, jax.random.key(seed)).inner_state[0].mu
        return np.concatenate([np.reshape(leaf, (2, 160)) for leaf in jax.tree.leaves(moments)])

    one, same, other = masks(0), masks(0), masks(1)
    np.testing.assert_array_equal(one, same)
    overlap = np.corrcoef(np.concatenate([one, other])) - np.eye(12)
    assert np.abs(overlap).max() < 0.4  # 160 entries: 5 standard deviations


def test_jitted_reset_equals_eager_reset() -> None:
    state = filled(with_reset(optax.adam(1e-2), prune=random(0.6), is_factor=is_factor).init(PARAMS))
    compiled = jax.jit(reset)(state, KEY)
    assert jax.tree.structure(compiled) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, compiled, reset(state, KEY))


# --- counts


def grouped(inner: Callable[[], Any] = lambda: optax.scale_by_adam()) -> Any:
    return optax.partition({"factors": inner(), "rest": inner()}, LABELS)


@pytest.mark.parametrize("reset_count", (False, True))
def test_reset_count_zeroes_only_the_count_of_the_factors(reset_count: bool) -> None:
    tx = with_reset(grouped(), prune=zero(), reset_count=reset_count, is_factor=is_factor)
    groups = reset(filled(tx.init(PARAMS)), KEY).inner_state.inner_states
    assert int(groups["rest"].inner_state.count) == 7
    assert int(groups["factors"].inner_state.count) == (0 if reset_count else 7)


def test_reset_count_is_rejected_if_surviving_statistics_need_the_count() -> None:
    for prune in (magnitude(0.9), random(0.9), none()):
        with pytest.raises(ValueError, match=rf"prune=zero: statistics that survive {re.escape(str(prune))}"):
            with_reset(grouped(), prune=prune, reset_count=True)


def test_reset_count_is_rejected_if_other_parameters_share_the_count() -> None:
    tx = with_reset(optax.adam(1e-2), prune=zero(), reset_count=True, is_factor=is_factor)
    with pytest.raises(ValueError, match=r"also reset the count of flat/bias: put .* group_labels"):
        tx.init(PARAMS)
    alone = {"stack": {"a": PARAMS["stack"]["a"]}}
    state = reset(filled(tx.init(alone)), KEY)
    assert int(state.inner_state[0].count) == 0


# --- rejections


class Pairs(NamedTuple):
    """A custom state: stores something per parameter, in a layout that optax does not use."""

    step: Any
    slots: Any


def pairs() -> optax.GradientTransformation:
    return optax.GradientTransformation(
        lambda params: Pairs(jnp.zeros(()), jax.tree.map(lambda p: (p, p), params)),
        lambda updates, state, params=None: (updates, state),
    )


REJECTED: dict[str, tuple[Callable[[], Any], str]] = {
    "schedule_free": (lambda: optax.contrib.schedule_free_adamw(1e-2), "ScheduleFreeState.z"),
    "lookahead": (lambda: optax.lookahead(optax.adam(1e-2), 5, 0.5), "LookaheadState > ScaleByAdamState.mu"),
    "MultiSteps": (
        lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        "MultiStepsState.acc_grads",
    ),
    "sam": (lambda: optax.contrib.sam(optax.adam(1e-2), optax.sgd(1e-2)), "SAMState.cache"),
    "deep inside": (
        lambda: optax.chain(optax.clip(1.0), grouped(lambda: optax.contrib.prodigy())),
        "PartitionState > MaskedState > ProdigyState.exp_avg",
    ),
    "galore": (lambda: optax.contrib.galore(1e-2, rank=2), "GaLoreState.projector"),
    "flattened": (lambda: optax.chain(optax.flatten(optax.trace(0.9)), optax.adam(1e-2)), "TraceState.trace"),
    "custom": (lambda: optax.chain(pairs(), optax.adam(1e-2)), "Pairs.slots"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_unsupported_statistics_are_rejected_by_name(name: str) -> None:
    make, owner = REJECTED[name]
    tx = with_reset(make(), prune=zero(), is_factor=is_factor)
    params = optax.LookaheadParams.init_synced(PARAMS) if name == "lookahead" else PARAMS
    with pytest.raises(ValueError, match=f"does not support {re.escape(owner)}, .* use another transf"):
        tx.init(params)


def test_nested_with_reset_is_rejected() -> None:
    inner = optax.chain(with_reset(optax.adam(1e-2), prune=zero(), is_factor=is_factor))
    with pytest.raises(ValueError, match="use only one"):
        with_reset(inner, prune=zero(), is_factor=is_factor).init(PARAMS)


AROUND: dict[str, tuple[Callable[[Any], Any], str]] = {
    "schedule_free": (lambda tx: optax.contrib.schedule_free(tx, 1e-2), "ScheduleFreeState.z"),
    "sam": (lambda tx: optax.contrib.sam(tx, optax.sgd(1e-2)), "SAMState.cache"),
    "custom": (lambda tx: optax.chain(tx, pairs()), "Pairs.slots"),
    "momentum before": (lambda tx: optax.chain(optax.trace(0.9), tx), "TraceState.trace"),
    "average after": (lambda tx: optax.chain(tx, optax.ema(0.9)), "EmaState.ema"),
    "momentum of the factors alone": (
        lambda tx: optax.chain(
            optax.masked(optax.trace(0.9), jax.tree.map(lambda label: label == "factors", LABELS)), tx
        ),
        "MaskedState > TraceState.trace",
    ),
    "flattened": (lambda tx: optax.chain(optax.flatten(optax.trace(0.9)), tx), "TraceState.trace"),
    "in MultiSteps": (
        lambda tx: optax.MultiSteps(optax.chain(tx, optax.ema(0.9)), 2).gradient_transformation(),
        "MultiStepsState > EmaState.ema",
    ),
}


@pytest.mark.parametrize("name", AROUND)
def test_reset_rejects_what_an_outer_transformation_stores_of_a_factor(name: str) -> None:
    make, owner = AROUND[name]
    state = make(with_reset(optax.adam(1e-2), prune=zero(), is_factor=is_factor)).init(PARAMS)
    with pytest.raises(ValueError, match=f"does not support {re.escape(owner)}, .* use another transf"):
        reset(state, KEY)


def test_reset_rejects_lookahead_whose_slow_parameters_no_restart_merges() -> None:
    tx = optax.lookahead(with_reset(optax.adam(1e-2), prune=zero(), is_factor=is_factor), 5, 0.5)
    with pytest.raises(ValueError, match=r"does not support LookaheadState\.fast_state"):
        reset(tx.init(optax.LookaheadParams.init_synced(PARAMS)), KEY)


REST = jax.tree.map(lambda label: label == "rest", LABELS)
NOTHING: dict[str, tuple[Any, str]] = {
    "no with_reset": (optax.adam(1e-2), "no with_reset state found"),
    "no factor": (with_reset(optax.adam(1e-2), prune=zero()), "no statistics of a factor found"),
    "plain sgd": (
        with_reset(optax.sgd(1e-2), prune=zero(), is_factor=is_factor),
        "no statistics of a factor found",
    ),
    "factors excluded": (
        with_reset(optax.masked(optax.adam(1e-2), REST), prune=zero(), is_factor=is_factor),
        "no statistics of a factor found",
    ),
}


@pytest.mark.parametrize("name", NOTHING)
def test_reset_that_would_reset_nothing_raises(name: str) -> None:
    tx, message = NOTHING[name]
    with pytest.raises(ValueError, match=message):
        reset(tx.init(PARAMS), KEY)


# --- composition with optax


def inner() -> optax.GradientTransformationExtraArgs:
    return with_reset(optax.adam(1e-2), prune=zero(), is_factor=is_factor)


OUTSIDE: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.clip(1.0), inner(), optax.scale(-1.0)),
    "partition": lambda: optax.partition({"factors": inner(), "rest": optax.adam(1e-2)}, LABELS),
    "masked": lambda: optax.masked(inner(), jax.tree.map(lambda rest: not rest, REST)),
    "MultiSteps": lambda: optax.MultiSteps(inner(), 3).gradient_transformation(),
    "partitioned MultiSteps": lambda: optax.partition(
        {"factors": OUTSIDE["MultiSteps"](), "rest": optax.adam(1e-2)}, LABELS
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(inner(), 3),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_reset_finds_its_state_at_any_nesting(name: str) -> None:
    tx = OUTSIDE[name]()
    state = tx.init(PARAMS)
    for seed in (1, 2, 3, 4):  # amid an accumulation
        state = tx.update(drawn(seed), state, PARAMS)[1]
    before, after = leaves(state), leaves(reset(state, KEY))
    cleared = {p for p in before if re.search(r"inner_state\[0\]\.[mn]u", p) and factor_of(p)}
    assert {factor_of(path) for path in cleared} == FACTORS and len(cleared) == 8
    cleared |= {p for p in before if ".acc_grads" in p and factor_of(p)}
    for path, old in before.items():
        np.testing.assert_array_equal(after[path], 0 if path in cleared else old, err_msg=path)
        assert path not in cleared or np.any(old), path
    tx.update(drawn(5), reset(state, KEY), PARAMS)


def test_wrapped_updates_are_bitwise_those_of_the_inner_transformation() -> None:
    def make() -> Any:
        return optax.chain(optax.adamw(1.0), scale_by_rate(2.0))

    plain, wrapped = make(), with_reset(make(), prune=zero(), is_factor=is_factor)
    one, other = plain.init(PARAMS), wrapped.init(PARAMS)
    for seed in range(3):
        mine, other = wrapped.update(drawn(seed), other, PARAMS, learning_rate=0.1)
        theirs, one = plain.update(drawn(seed), one, PARAMS, learning_rate=0.1)
        jax.tree.map(np.testing.assert_array_equal, (mine, other.inner_state), (theirs, one))


class Net(nnx.Module):
    def __init__(self) -> None:
        self.body = nnx.List([nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 6, rngs=nnx.Rngs(1))])
        self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(2))
        wrap(self, rank=2, alpha=4.0, targets=lambda path, _: path[0] == "body", rngs=nnx.Rngs(3))

    def __call__(self, x: Any) -> Any:
        for layer in self.body:
            x = jnp.tanh(layer(x))
        return self.head(x)


def adam_moments(optimizer: nnx.Optimizer) -> dict[bool, list[np.ndarray]]:
    """Adam's moments of the factors (True) and of the rest (False)."""
    moments: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for path, value in leaves(optimizer.opt_state).items():
        if re.search(r"\.[mn]u\b", path):
            moments["lora_" in path].append(value)
    return moments


@pytest.mark.parametrize("grouping", (pytest.param("one group", marks=pytest.mark.slow), "two groups"))
def test_nnx_optimizer_around_with_reset_updates_and_resets(grouping: str) -> None:
    model, x = Net(), jax.random.normal(KEY, (8, 5))
    adam = optax.adamw(1e-2)
    if grouping == "two groups":
        labels = group_labels(nnx.state(model, nnx.Param))
        adam = optax.partition({"factors": optax.adamw(1e-2), "rest": optax.adamw(1e-2)}, labels)
    optimizer = nnx.Optimizer(model, with_reset(adam, prune=zero()), wrt=nnx.Param)
    structure = jax.tree.structure(optimizer.opt_state)

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer) -> Any:
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    @nnx.jit
    def restart(model: Net, optimizer: nnx.Optimizer, key: Any) -> None:
        merge_and_reinit(model, key=key)
        optimizer.opt_state = reset(optimizer.opt_state, key)

    losses = [step(model, optimizer) for _ in range(3)]
    old, y = adam_moments(optimizer), model(x)
    assert len(old[True]) == 8 and all(map(np.any, old[True]))
    restart(model, optimizer, KEY)
    np.testing.assert_allclose(model(x), y, atol=1e-6)
    new = adam_moments(optimizer)
    assert len(new[True]) == 8 and not any(map(np.any, new[True]))
    jax.tree.map(np.testing.assert_array_equal, new[False], old[False])
    losses += [step(model, optimizer) for _ in range(3)]
    assert np.all(np.diff(losses) < 0) and all(map(np.any, adam_moments(optimizer)[True]))
    optimizer.opt_state = reset(optimizer.opt_state, KEY)  # also outside of nnx.jit
    assert jax.tree.structure(optimizer.opt_state) == structure
    assert not any(map(np.any, adam_moments(optimizer)[True]))


def by_name(params: Any) -> Any:
    """Labels mapped over the arrays inside the Variables, as optax's own functions map theirs."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "factors" if "lora_" in jax.tree_util.keystr(path) else "rest", params
    )


def over_arrays() -> Any:
    return optax.partition({"factors": optax.adam(1e-2), "rest": optax.adam(1e-2)}, by_name)


def two_updates_around_a_reset(tx: Any, model: Any, optimizer: str) -> tuple[Tree, Tree]:
    """The arrays of the optimizer's state before and after the reset."""
    params = nnx.state(model, nnx.Param)
    grads = jax.tree.map(jnp.ones_like, params)
    if optimizer == "nnx.Optimizer":
        wrapped = nnx.Optimizer(model, tx, wrt=nnx.Param)
        wrapped.update(model, grads)
        before = leaves(wrapped.opt_state)
        wrapped.opt_state = reset(wrapped.opt_state, KEY)
        after = leaves(wrapped.opt_state)
        wrapped.update(model, grads)
    else:
        state = jax.jit(tx.update)(grads, tx.init(params), params)[1]
        before, state = leaves(state), jax.jit(reset)(state, KEY)
        after = leaves(state)
        tx.update(grads, state, params)
    return before, after


OVER_ARRAYS: dict[str, Callable[[], Any]] = {
    "muon": lambda: with_reset(optax.contrib.muon(1e-2), prune=zero()),
    "partition": lambda: with_reset(over_arrays(), prune=magnitude(0.5)),
    "partition with its count": lambda: with_reset(over_arrays(), prune=zero(), reset_count=True),
    "partition around it": lambda: optax.partition(
        {
            "factors": with_reset(optax.adam(1e-2), prune=zero(), reset_count=True),
            "rest": optax.adam(1e-2),
        },
        by_name,
    ),
}


@pytest.mark.parametrize("optimizer", (pytest.param("plain", marks=pytest.mark.slow), "nnx.Optimizer"))
@pytest.mark.parametrize("name", OVER_ARRAYS)
def test_labels_may_be_mapped_over_the_arrays_of_a_state(name: str, optimizer: str) -> None:
    before, after = two_updates_around_a_reset(OVER_ARRAYS[name](), Net(), optimizer)
    moments = {path for path in before if re.search(r"\.[mn]u\b.*lora_", path)}
    counts = {path for path in before if path.endswith(("count", "count.value")) and "factors" in path}
    assert len(moments) == (4 if name == "muon" else 8) and (len(counts) == 1 or name == "muon")
    for path, old in before.items():
        if path in moments:
            survivors = old.size // 2 if name == "partition" else 0
            assert np.count_nonzero(old) == old.size and np.count_nonzero(after[path]) == survivors, path
        else:
            cleared = path in counts and name not in ("muon", "partition")
            np.testing.assert_array_equal(after[path], 0 if cleared else old, err_msg=path)


def test_reset_leaves_the_factors_of_other_lora_layers_alone() -> None:
    model = Net()
    model.other = nnx.LoRA(5, 2, 3, base_module=nnx.Linear(5, 3, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(4))
    model.linear = nnx.LoRALinear(5, 3, lora_rank=2, rngs=nnx.Rngs(5))
    labels = group_labels(nnx.state(model, nnx.Param))
    owned = {path[0] for path, label in nnx.to_flat_state(labels) if label == "factors"}
    assert owned == {"body"}
    before, after = two_updates_around_a_reset(with_reset(optax.adam(1e-2), prune=zero()), model, "plain")
    moments = {path for path in before if re.search(r"\.[mn]u\b.*lora_", path)}
    ours = {path for path in moments if "body" in path}
    assert len(ours) == len(moments - ours) == 8
    for path in moments:
        np.testing.assert_array_equal(after[path], 0 if path in ours else before[path], err_msg=path)


# --- make_optimizer

SETTINGS = {"b1": 0.8, "b2": 0.95, "eps": 1e-3, "weight_decay": 0.3}
NORMS = ("norm", "scale")


def variables(values: Tree) -> nnx.State:
    """The values as model variables: factors, matrices, norms and a bias, stacked and not."""
    axes = {"lora_a": ("layers", "in", "rank"), "scale": ("layers", "norm"), "embed": ("vocab", "embed")}
    axes |= {"norm": ("norm",), "bias": ("layers", "bias")}
    kinds = {"lora_a": LowRankFactor}
    return nnx.State(
        {n: kinds.get(n, nnx.Param)(v, **({"axes": axes[n]} if n in axes else {})) for n, v in values.items()}
    )


def values(seed: int) -> Tree:
    shapes = {"lora_a": (2, 3, 2), "scale": (2, 3), "embed": (5, 3), "norm": (3,), "plain": (3, 4)}
    shapes["bias"] = (2, 3)
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("clip_norm", (0.7, 1e3, 0.0))
def test_make_optimizer_matches_adamw_in_float64(clip_norm: float) -> None:
    b1, b2, eps, decay = SETTINGS.values()
    ratio = 2.5
    with jax.enable_x64(True):
        params = variables({name: jnp.asarray(v) for name, v in values(0).items()})
        tx = make_optimizer(params, clip_norm=clip_norm, factor_lr_ratio=ratio, **SETTINGS)
        state, w = tx.init(params), values(0)
        m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
        update = jax.jit(tx.update)
        for t in range(1, 7):
            g, rate = values(t), 0.1 / t
            updates, state = update(
                variables(jax.tree.map(jnp.asarray, g)), state, params, learning_rate=rate
            )
            params = optax.apply_updates(params, updates)
            norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
            for name in w:
                clipped = g[name] * (clip_norm / norm if 0 < clip_norm < norm else 1)
                m[name] = b1 * m[name] + (1 - b1) * clipped
                v[name] = b2 * v[name] + (1 - b2) * clipped**2
                step = m[name] / (1 - b1**t) / (np.sqrt(v[name] / (1 - b2**t)) + eps)
                step += 0 if name in NORMS else decay * w[name]
                w[name] = w[name] - rate * (ratio if name == "lora_a" else 1) * step
        for name in w:
            np.testing.assert_allclose(params[name][...], w[name], rtol=1e-12, err_msg=name)


def test_rate_is_an_argument_and_the_state_has_no_count() -> None:
    tx = scale_by_rate(-2.0)
    updates, state = tx.update(PARAMS, tx.init(PARAMS), learning_rate=jnp.float32(0.25))
    jax.tree.map(lambda u, p: np.testing.assert_array_equal(u, -0.5 * p), updates, PARAMS)
    assert not jax.tree.leaves(state)
    with pytest.raises(TypeError, match="rate"):
        tx.update(PARAMS, state)


def test_carry_over_rest_copies_the_rest_and_leaves_factors_at_zero() -> None:
    full = variables({n: jnp.asarray(v, jnp.float32) for n, v in values(0).items() if n != "lora_a"})
    low = variables({n: jnp.asarray(v, jnp.float32) for n, v in values(0).items() if n != "plain"})
    old = make_optimizer(full, clip_norm=1.0, **SETTINGS).init(full)
    old = jax.tree.map(lambda leaf: jnp.full_like(leaf, 3), old)
    new = leaves(carry_over_rest(make_optimizer(low, clip_norm=1.0, **SETTINGS).init(low), old))
    assert {path for path, leaf in new.items() if np.any(leaf)} == {p for p in new if "'rest'" in p}
    assert all(np.all(leaf == 3) for path, leaf in new.items() if "'rest'" in path)
    assert sum("count" in path for path in new) == 2 and any("lora_a" in path for path in new)
