"""A low-rank layer computes the same function as its linear layer, before and after restarts."""

import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax import lax

from relora_jax.config import ModelConfig
from relora_jax.core import base, low_rank
from relora_jax.core.low_rank import BaseKernel, LowRankDense, merge_and_reinit, unwrap, wrap
from relora_jax.core.product import kept, product
from relora_jax.model.llama import Llama

EVERY = lambda path, module: True  # noqa: E731
FORMS = ("separate", "fused")
TOKENS, IN, OUT, RANK = 7, 6, 5, 2


def drawn(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape) / 2, jnp.float32)


def plain(fan_in: int, fan_out: int, *layers: int, kind: type = nnx.Linear, **options: Any) -> Any:
    """An `nnx.Linear`, optionally stacked, with random values from NumPy."""
    linear = kind(fan_in, fan_out, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros, **options)
    linear.kernel.set_value(drawn(*layers, fan_in, fan_out))
    if linear.bias is not None:
        linear.bias.set_value(drawn(*layers, fan_out))
    return linear


class Mlp(nnx.Module):
    """Unstacked: a list, a dict, a shared layer, and one without bias."""

    def __init__(self, **options: Any) -> None:
        self.inlet = plain(IN, 8, **options)
        self.body = nnx.List([plain(8, 8, **options)])
        self.shared = self.body[0]
        self.ends = nnx.Dict(out=plain(8, OUT, use_bias=False, **options))

    def __call__(self, x: Any) -> Any:
        for layer in (self.inlet, *self.body, self.shared):
            x = jnp.tanh(layer(x))
        return self.ends["out"](x)


class Stack(nnx.Module):
    """Three stacked layers, scanned."""

    def __init__(self, **options: Any) -> None:
        self.blocks = plain(IN, IN, 3, **options)

    def __call__(self, x: Any) -> Any:
        graph, layers = nnx.split(self.blocks)
        x = x.astype(self.blocks.dtype or x.dtype)
        return lax.scan(lambda x, layer: (jnp.tanh(nnx.merge(graph, layer)(x)), None), x, layers)[0]


MODELS = {"lists and shared": Mlp, "stacked": Stack}


def make(kind: str = "lists and shared", **options: Any) -> Any:
    return MODELS[kind](**options)


def lower(model: Any, **options: Any) -> Any:
    """The wrapped model with freshly initialized factors."""
    return wrap(model, **{"rank": RANK, "alpha": 3.0, "targets": EVERY, "rngs": nnx.Rngs(1)} | options)


def dense(fan_in: int = IN, fan_out: int = OUT, **options: Any) -> LowRankDense:
    return lower(plain(fan_in, fan_out), **options)


def disturb(model: Any, size: float = 1.0) -> Any:
    """The model with a nonzero delta: every B is random."""
    for _, layer in low_rank.low_rank_layers(model):
        layer.lora_b[...] = (size * drawn(*layer.lora_b.shape)).astype(layer.lora_b.dtype)
    return model


def inputs() -> Any:
    return drawn(TOKENS, IN)


def exact_sum(layer: LowRankDense) -> np.ndarray:
    """W + (alpha / rank) A B in float64."""
    w, a, b = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.lora_a, layer.lora_b))
    return w + layer.alpha / layer.rank * (a @ b)


# --- wrap


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("kind", MODELS)
def test_wrap_leaves_the_function_unchanged(kind: str, dtype: Any, form: str) -> None:
    model, x = make(kind, dtype=dtype), inputs()
    before = model(x)
    after = lower(model, product=form)(x)
    assert before.dtype == after.dtype == dtype
    np.testing.assert_array_equal(np.asarray(after, np.float32), np.asarray(before, np.float32))


@pytest.mark.parametrize("kind", MODELS)
def test_wrap_freezes_kernels_and_keeps_biases(kind: str) -> None:
    model = make(kind)
    linears = {path: layer for path, layer in nnx.iter_graph(model) if type(layer) is nnx.Linear}
    lower(model)
    layers = dict(low_rank.low_rank_layers(model))
    assert layers.keys() == linears.keys()
    for path, layer in layers.items():
        assert type(layer.kernel) is BaseKernel and layer.bias is linears[path].bias
        np.testing.assert_array_equal(layer.kernel[...], linears[path].kernel[...])
        assert type(layer.lora_a) is type(layer.lora_b) is low_rank.LowRankFactor
    assert not any(isinstance(node, nnx.Linear) for _, node in nnx.iter_graph(model))
    if kind == "lists and shared":
        assert model.shared is model.body[0] and len(layers) == 3


def test_targets_are_selected_by_path_and_other_layers_stay_plain() -> None:
    calls = []

    def targets(path: low_rank.Path, module: nnx.Linear) -> bool:
        calls.append((path, type(module)))
        return path == ("inlet",)

    model = lower(make(), targets=targets)
    # the shared layer appears once, under either of its names
    names = {path for path, _ in calls} - {("shared",), ("body", 0)}
    assert len(calls) == 3 and names == {("inlet",), ("ends", "out")}
    assert {kind for _, kind in calls} == {nnx.Linear}
    assert [path for path, _ in low_rank.low_rank_layers(model)] == [("inlet",)]
    assert type(model.shared) is type(model.body[0]) is type(model.ends["out"]) is nnx.Linear


def test_factor_axes_are_named_after_kernel_axes() -> None:
    named = lower(plain(IN, OUT, kernel_metadata={"axes": ("embed", "vocab")}))
    assert named.kernel.axes == ("embed", "vocab")
    assert (named.lora_a.axes, named.lora_b.axes) == (("embed", "rank"), ("rank", "vocab"))
    assert unwrap(named).kernel.axes == ("embed", "vocab")
    stack = lower(make("stacked")).blocks
    assert (stack.lora_a.axes, stack.lora_b.axes) == (("layers", "in", "rank"), ("layers", "rank", "out"))


class Subclass(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        return -super().__call__(inputs, out_sharding)


def wrap_mlp(**options: Any) -> Callable[[], Any]:
    return lambda: lower(make(), **options)


def wrap_linear(**options: Any) -> Callable[[], Any]:
    return lambda: lower(plain(IN, OUT, **options))


def wrap_in_plain_list() -> Any:
    model = make()
    model.plain = nnx.data([plain(IN, OUT)])
    return lower(model, targets=lambda path, module: path[0] == "plain")


INVALID: dict[str, tuple[Callable[[], Any], str]] = {
    "rank above the smaller side": (wrap_mlp(rank=6), r"ends/out: rank 6 does not fit a 8 x 5 .* 1 to 5"),
    "rank zero": (wrap_mlp(rank=0), "rank 0 does not fit"),
    "alpha zero": (wrap_mlp(alpha=0.0), "alpha 0.0 must be finite and above 0"),
    "alpha not finite": (wrap_mlp(alpha=float("inf")), "alpha inf must be finite"),
    "dropout one": (wrap_mlp(dropout=1.0), r"dropout 1.0 must be in \[0, 1\)"),
    "dropout not a number": (wrap_mlp(dropout=float("nan")), "dropout nan must be in"),
    "dropout fused": (
        wrap_mlp(dropout=0.1, product="fused"),
        "product fused does not support .*: use separate",
    ),
    "product": (wrap_mlp(product="fold"), "product 'fold' is not valid: use separate or fused"),
    "base_init": (wrap_mlp(base_init="zeros"), "base_init 'zeros' is not valid: use keep or zero"),
    "base_dtype": (wrap_mlp(base_dtype=jnp.float16), "base_dtype 'float16' is not valid: use float32"),
    "nothing selected": (wrap_mlp(targets=lambda p, m: False), "selects none .*layers: .*ends/out, inlet"),
    "no linear": (lambda: lower(nnx.BatchNorm(3, rngs=nnx.Rngs(0))), "selects none .*: it has none"),
    "a subclass": (
        wrap_linear(kind=Subclass),
        "exclude the model: class Subclass has its own __call__",
    ),
    "own product": (wrap_linear(dot_general=lambda *a, **k: lax.dot_general(*a, **k)), "custom dot_general"),
    "own promotion": (wrap_linear(promote_dtype=lambda *a, **k: a[0]), "custom promote_dtype"),
    "own result": (wrap_linear(preferred_element_type=jnp.float32), "custom preferred_element_type"),
    "a plain container": (wrap_in_plain_list, "plain/0 is in a plain list, .* use nnx.List"),
    "merge of a plain model": (
        lambda: merge_and_reinit(make(), key=jax.random.key(0)),
        "call wrap first",
    ),
    "unwrap of a plain model": (lambda: unwrap(make()), "no LowRankDense: call wrap first"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_wrap_raises_in_one_line(case: str) -> None:
    call, message = INVALID[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_failed_wrap_leaves_the_model_unchanged() -> None:
    model = make()
    with pytest.raises(ValueError, match="rank 6"):
        lower(model, rank=6)
    assert type(model.inlet) is type(model.body[0]) is nnx.Linear


# --- the product


def reference(layer: LowRankDense, x: Any, dy: Any) -> dict[str, np.ndarray]:
    """The layer's output and the gradients of sum(y * dy) in float64, from the formula."""
    a, b = (np.asarray(v[...], np.float64) for v in (layer.lora_a, layer.lora_b))
    x, dy, w = np.asarray(x, np.float64), np.asarray(dy, np.float64), exact_sum(layer)
    scale = layer.alpha / layer.rank
    y = x @ w + np.asarray(layer.bias[...], np.float64)
    return {"y": y, "x": dy @ w.T, "a": scale * x.T @ dy @ b.T, "b": scale * (x @ a).T @ dy}


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)], ids=("float32", "bfloat16")
)
@pytest.mark.parametrize("form", FORMS)
def test_both_products_equal_the_formula_and_its_gradients(form: str, dtype: Any, tolerance: float) -> None:
    layer = disturb(dense(24, 16, rank=5, product=form))
    layer.dtype = dtype
    x, dy = drawn(3, TOKENS, 24).astype(dtype), drawn(3, TOKENS, 16).astype(dtype)
    graph, state = nnx.split(layer)

    def value(x: Any, state: Any) -> Any:
        return jnp.sum((nnx.merge(graph, state)(x) * dy).astype(jnp.float32))

    dx, grads = jax.jit(jax.grad(value, argnums=(0, 1)))(x, state)
    ours = {"y": layer(x), "x": dx, "a": grads["lora_a"][...], "b": grads["lora_b"][...]}
    assert ours["y"].dtype == dtype and ours["a"].dtype == ours["b"].dtype == jnp.float32
    flat = reference(layer, x.reshape(-1, 24), dy.reshape(-1, 16))
    for name, theirs in flat.items():
        mine = np.asarray(ours[name], np.float64).reshape(theirs.shape)
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs), name
    np.testing.assert_array_equal(grads["kernel"][...], 0)


def merged_kernel_is_base_plus_scaled_product(
    shape: tuple[int, int], rank: int, alpha: float, layers: list[int], seed: int
) -> None:
    rng, rank = np.random.default_rng(seed), min(rank, *shape)
    layer = dense(*shape, rank=rank, alpha=alpha)
    for name, sides in {"kernel": shape, "lora_a": (shape[0], rank), "lora_b": (rank, shape[1])}.items():
        getattr(layer, name).set_value(jnp.asarray(rng.normal(size=(*layers, *sides)), jnp.float32))
    expected, tolerance = exact_sum(layer), 1e-5 * (1 + alpha)
    np.testing.assert_allclose(layer.kernel[...] + layer.delta(), expected, atol=tolerance)
    merge_and_reinit(layer, key=jax.random.key(seed))
    np.testing.assert_allclose(layer.kernel[...], expected, atol=tolerance)
    assert not np.any(layer.lora_b[...]) and layer.lora_a.shape == (*layers, shape[0], rank)


ANY = {
    "shape": st.tuples(st.integers(1, 9), st.integers(1, 9)),
    "rank": st.integers(1, 9),
    "alpha": st.floats(0.01, 100),
    "layers": st.lists(st.integers(1, 3), max_size=2),
    "seed": st.integers(0, 2**31),
}
# each example compiles: use few of them, deterministic, and without shrinking
QUICK = settings(deadline=None, max_examples=5, derandomize=True, phases=[Phase.explicit, Phase.generate])
test_merged_kernel_is_base_plus_scaled_product = QUICK(
    given(**ANY)(merged_kernel_is_base_plus_scaled_product)
)
test_merged_kernel_is_base_plus_scaled_product_for_many_shapes = pytest.mark.slow(
    settings(QUICK, max_examples=100)(given(**ANY)(merged_kernel_is_base_plus_scaled_product))
)


def factor_gradients(model: Any) -> list[tuple[Any, Any]]:
    graph, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    grads = jax.grad(lambda f: jnp.sum(nnx.merge(graph, f, rest)(inputs()) ** 2))(factors)
    model = nnx.merge(graph, grads, rest)
    return [(layer.lora_a[...], layer.lora_b[...]) for _, layer in low_rank.low_rank_layers(model)]


@pytest.mark.parametrize("kind", MODELS)
def test_b_has_a_gradient_at_the_first_update_and_a_from_the_second(kind: str) -> None:
    model = lower(make(kind))
    gradients = factor_gradients(model)
    assert all(not np.any(a) and np.all(np.any(b, axis=(-2, -1))) for a, b in gradients)
    for (_, layer), (_, b) in zip(low_rank.low_rank_layers(model), gradients, strict=True):
        layer.lora_b[...] -= 0.1 * b
    assert all(np.all(np.any(a, axis=(-2, -1))) for a, _ in factor_gradients(model))


# --- draws


def check_uniform(values: Any, bound: float) -> None:
    """Checks that the values follow U(-bound, bound): bounds, mean, variance and distribution."""
    u = np.sort(np.ravel(np.asarray(values, np.float64))) / bound
    n = u.size
    assert n > 10_000 and np.abs(u).max() <= 1 and np.abs(u).max() > 1 - 20 / n
    assert abs(u.mean()) < 4 * np.sqrt(1 / 3 / n) and abs(u.var() - 1 / 3) < 4 * np.sqrt(4 / 45 / n)
    assert np.abs((u + 1) / 2 - np.arange(n) / n).max() < 1.95 / np.sqrt(n)  # Kolmogorov, p = 0.001


def check_uncorrelated(draws: list[np.ndarray]) -> None:
    """Checks that no two of the draws are correlated."""
    flat = np.stack([np.ravel(draw) for draw in draws]).astype(np.float64)
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 5 / np.sqrt(flat.shape[1])


def wide_model() -> Any:
    """Two stacked kernels of three layers each, 400 x 200."""
    return nnx.Dict(one=plain(400, 200, 3), two=plain(400, 200, 3))


def test_a_is_uniform_and_redrawn_for_each_kernel_layer_and_restart() -> None:
    model = lower(wide_model(), rank=16)
    layers = [layer for _, layer in low_rank.low_rank_layers(model)]
    draws = [np.asarray(layer.lora_a[...]) for layer in layers]
    assert not any(np.any(layer.lora_b[...]) for layer in layers)
    for seed in (3, 4):
        merge_and_reinit(model, key=jax.random.key(seed))
        draws += [np.asarray(layer.lora_a[...]) for layer in layers]
    for draw in draws:
        check_uniform(draw, 1 / np.sqrt(400))
    check_uncorrelated([layer for draw in draws for layer in draw])


def test_zero_base_draws_both_factors_and_zeroes_the_kernel() -> None:
    model = lower(wide_model(), rank=16, base_init="zero")
    layers = [layer for _, layer in low_rank.low_rank_layers(model)]
    for layer in layers:
        assert not np.any(layer.kernel[...])
        check_uniform(layer.lora_a[...], 1 / 4)
    check_uniform(np.stack([layer.lora_b[...] for layer in layers]), 1 / 4)
    check_uncorrelated(
        [np.ravel(f)[:3200] for layer in layers for v in (layer.lora_a, layer.lora_b) for f in v[...]]
    )
    merge_and_reinit(model, key=jax.random.key(5))
    assert all(np.any(layer.kernel[...]) and not np.any(layer.lora_b[...]) for layer in layers)
    check_uniform(layers[0].lora_a[...], 1 / np.sqrt(400))


# --- merges


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MODELS)
def test_merge_and_reinit_leaves_the_function_unchanged(kind: str, form: str) -> None:
    model, x = disturb(lower(make(kind), product=form)), inputs()
    before, kernels = model(x), [layer.kernel[...] for _, layer in low_rank.low_rank_layers(model)]
    after = merge_and_reinit(model, key=jax.random.key(3))(x)
    np.testing.assert_allclose(after, before, atol=2e-6)
    for (_, layer), old in zip(low_rank.low_rank_layers(model), kernels, strict=True):
        assert np.all(np.abs(layer.kernel[...] - old).max(axis=(-2, -1)) > 0.05)  # the merge is not empty


def test_merge_is_exact_up_to_rounding_of_the_base() -> None:
    layer = disturb(dense(64, 48, rank=16))
    expected = exact_sum(layer)
    merge_and_reinit(layer, key=jax.random.key(0))
    error = np.abs(np.asarray(layer.kernel[...], np.float64) - expected)
    assert error.max() < 4 * np.finfo(np.float32).eps * np.abs(expected).max()


def test_float64_base_keeps_its_precision_with_float32_factors() -> None:
    with jax.enable_x64(True):
        layer = disturb(dense(rank=1, base_dtype=jnp.float64), size=1e-9)
        layer.kernel[...] = jnp.full((IN, OUT), 1 / 3)
        expected = exact_sum(layer)
        merge_and_reinit(layer, key=jax.random.key(0))
        np.testing.assert_allclose(layer.kernel[...], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("base", (jnp.float32, jnp.bfloat16))
def test_every_product_of_a_merge_is_float32_at_highest_precision(base: Any) -> None:
    linear = plain(IN, OUT, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16)
    graph, state = nnx.split(lower(linear, base_dtype=base))

    def merge(state: Any) -> Any:
        return nnx.split(merge_and_reinit(nnx.merge(graph, state), key=jax.random.key(0)))[1]

    text = jax.jit(merge).lower(state).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products and all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert all(re.search(r"-> tensor<6x5xf32>", line) for line in products)


def test_wrap_rounds_a_bfloat16_base_to_nearest() -> None:
    model = make()
    kernel = model.inlet.kernel[...]
    lower(model, base_dtype=jnp.bfloat16)
    assert model.inlet.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(model.inlet.kernel[...], kernel.astype(jnp.bfloat16))


def many_merges(layer: LowRankDense, merges: int) -> np.ndarray:
    """The kernel after merging the layer's current delta `merges` times."""
    graph, state = nnx.split(layer)
    a, b = layer.lora_a[...], layer.lora_b[...]

    @jax.jit
    def run(state: Any) -> Any:
        def merge(n: Any, state: Any) -> Any:
            model = nnx.merge(graph, state)
            model.lora_a[...], model.lora_b[...] = a, b
            return nnx.split(merge_and_reinit(model, key=jax.random.fold_in(jax.random.key(1), n)))[1]

        return lax.fori_loop(0, merges, merge, state)

    return np.asarray(nnx.merge(graph, run(state)).kernel[...], np.float64)


@pytest.mark.parametrize("sign", (1, -1))
def test_merges_into_bfloat16_are_unbiased(sign: int) -> None:
    merges, base, step = 400, 2.0**-6, sign * 1e-6  # the spacing of bfloat16 above the base: 2^-13
    layer = dense(64, 48, rank=1, alpha=1.0, base_dtype=jnp.bfloat16)
    layer.kernel[...] = jnp.full((64, 48), 1.25 * base, jnp.bfloat16)
    layer.lora_a[...], layer.lora_b[...] = jnp.ones((64, 1)), jnp.full((1, 48), step)
    moved = many_merges(layer, merges) - 1.25 * base
    deviation = np.sqrt(merges * abs(step) * 2.0**-13 / moved.size)
    assert abs(moved.mean() - merges * step) < 4 * deviation < 0.1 * merges * abs(step)


def test_bfloat16_merge_preserves_representable_sums_and_non_finite_values() -> None:
    layer = dense(64, 48, rank=1, base_dtype=jnp.bfloat16)
    special = jnp.asarray([np.inf, -np.inf, np.nan, 3.0e38, -0.0], jnp.bfloat16)
    layer.kernel[...] = before = layer.kernel[...].at[0, :5].set(special)
    merge_and_reinit(layer, key=jax.random.key(0))
    np.testing.assert_array_equal(layer.kernel[...].astype(np.float32), before.astype(np.float32))


def test_stochastic_rounding_keeps_every_nan_a_nan() -> None:
    bits = jnp.asarray([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001], jnp.uint32)
    x = lax.bitcast_convert_type(jnp.tile(bits, 100), jnp.float32)
    assert np.all(np.isnan(base.round_stochastically(x, jax.random.key(0))))


# --- dropout


def identity_branch(dropout: float = 0.25) -> LowRankDense:
    """y = dropout(x): no base, A = B = I."""
    layer = dense(5, 5, rank=5, alpha=5.0, dropout=dropout)
    layer.kernel[...], layer.lora_a[...], layer.lora_b[...] = jnp.zeros((5, 5)), jnp.eye(5), jnp.eye(5)
    layer.bias[...] = jnp.zeros(5)
    return layer


def test_dropout_zeroes_the_given_fraction_and_is_unbiased() -> None:
    x = drawn(4000, 5) + 3
    ratio = np.asarray(identity_branch()(x, key=jax.random.key(1)) / x)
    assert np.allclose(ratio[ratio != 0], 1 / 0.75, rtol=1e-5)
    deviation = np.sqrt(0.25 * 0.75 / ratio.size)
    assert abs((ratio == 0).mean() - 0.25) < 4 * deviation
    assert abs(ratio.mean() - 1) < 4 * deviation / 0.75
    assert np.all(np.abs(np.mean(ratio == 0, axis=0) - 0.25) < 4 * deviation * np.sqrt(5))


@pytest.mark.parametrize("x64", [False, True])
def test_dropout_is_independent_between_tokens_and_columns(x64: bool) -> None:
    with jax.enable_x64(x64):
        mask = np.asarray(kept(jax.random.key(2), (2, 300, 400), 0.1), np.float64).reshape(600, 400)
    assert abs(mask.mean() - 0.9) < 4 * 0.3 / np.sqrt(mask.size)
    largest = np.linalg.norm((mask - 0.9) / 0.3, ord=2)
    assert largest < 1.05 * (np.sqrt(600) + np.sqrt(400))  # of independent entries: Marchenko and Pastur


def test_dropout_affects_only_the_branch_and_needs_a_key() -> None:
    layer, x = dense(dropout=0.5), inputs()
    plain = layer(x)
    np.testing.assert_array_equal(layer(x, key=jax.random.key(0)), plain)  # B = 0: the branch is zero
    disturb(layer)
    np.testing.assert_allclose(layer(x), x @ exact_sum(layer) + layer.bias[...][None], atol=1e-5)
    one, same, other = (layer(x, key=jax.random.key(n)) for n in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.any(one != other) and np.any(one != layer(x))


def test_dropout_keys_differ_by_kernel_and_layer_and_follow_the_key() -> None:
    def dropout_keys(seed: int) -> np.ndarray:
        model = nnx.Dict(stack=make("stacked"), mlp=make())
        lower(model, dropout=0.5, targets=lambda path, module: path != ("mlp", "inlet"))
        lower(model, dropout=0.0)  # the remaining layer: no dropout, no key
        low_rank.with_dropout_keys(model, key=jax.random.key(seed))
        assert model["mlp"].inlet.dropout_key is None
        keys = [layer.dropout_key for _, layer in low_rank.low_rank_layers(model) if layer.dropout]
        assert all(type(key) is low_rank.BranchKey for key in keys)
        return np.concatenate([np.reshape(jax.random.key_data(key[...]), (-1, 2)) for key in keys])

    one, same, other = dropout_keys(0), dropout_keys(0), dropout_keys(1)
    np.testing.assert_array_equal(one, same)
    assert len(np.unique(np.concatenate([one, other]), axis=0)) == 2 * (3 + 2)


def test_stored_keys_act_like_passed_keys() -> None:
    layer, x = disturb(dense(dropout=0.5)), inputs()
    low_rank.with_dropout_keys(layer, key=jax.random.key(4))
    np.testing.assert_array_equal(layer(x), layer(x, key=layer.dropout_key[...]))
    assert np.any(layer(x) != layer(x, key=jax.random.key(5)))  # a passed key takes precedence
    stack = disturb(lower(make("stacked"), dropout=0.5))
    evaluated = stack(x)
    low_rank.with_dropout_keys(stack, key=jax.random.key(4))
    assert np.any(stack(x) != evaluated)


# --- unwrap


@pytest.mark.parametrize("base", (jnp.float32, jnp.bfloat16))
@pytest.mark.parametrize("kind", MODELS)
def test_unwrap_returns_plain_linears_with_the_same_function(kind: str, base: Any) -> None:
    model, x = disturb(lower(make(kind), base_dtype=base)), inputs()
    before, layers = model(x), dict(low_rank.low_rank_layers(model))
    sums = {path: exact_sum(layer) for path, layer in layers.items()}
    np.testing.assert_allclose(unwrap(model)(x), before, atol=1e-5)
    linears = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Linear)}
    assert linears.keys() == layers.keys()
    for path, linear in linears.items():
        assert type(linear) is nnx.Linear and type(linear.kernel) is nnx.Param
        assert linear.kernel.dtype == jnp.float32 and linear.bias is layers[path].bias
        np.testing.assert_allclose(linear.kernel[...], sums[path], atol=1e-6)
    if kind == "lists and shared":
        assert model.shared is model.body[0]
    lower(model)  # it can be wrapped again
    np.testing.assert_allclose(model(x), before, atol=1e-5)


# --- compiled programs

LLAMA = ModelConfig(
    vocab_size=61, hidden=20, mlp=28, layers=2, heads=4, kv_heads=2, head_dim=6, compute_dtype="float32"
)
ROWS, LENGTH, LLAMA_RANK = 3, 11, 5  # 33 tokens: differs from every side, rank and vocabulary


def kernel_sized_products(hlo: str, kernels: set[tuple[int, ...]], tokens: int) -> list[str]:
    """The dots in the HLO that have the shape of a kernel and contract over tokens."""
    shapes = {
        name: tuple(map(int, filter(None, sides.split(","))))
        for name, sides in re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", hlo)
    }
    dots = re.findall(r"(%[\w.-]+) = \w+\[[\d,]*\]\S* dot\((%[\w.-]+),.*lhs_contracting_dims={([\d,]*)}", hlo)
    assert len(dots) > 3 and all(lhs in shapes for _, lhs, _ in dots)
    sides = {tuple(sorted(kernel)) for kernel in kernels}
    products = []
    for name, lhs, dims in dots:
        contracted = {shapes[lhs][int(d)] for d in dims.split(",")}
        result = tuple(sorted(side for side in shapes[name] if side > 1))
        over_tokens = contracted & {tokens, ROWS, LENGTH}
        if over_tokens and any(set(kernel) <= set(result) for kernel in sides):
            products.append(f"{name} {shapes[name]} over {contracted}")
    return products


def compiled_gradient(product: Callable[..., Any], tokens: int = 33) -> str:
    """HLO of the gradient of sum(product(x, W, A, B)^2) with respect to x, A and B: 20 x 28, rank 5."""
    shapes = ((tokens, 20), (20, 28), (20, 5), (5, 28))
    grad = jax.grad(lambda x, w, a, b: jnp.sum(product(x, w, a, b) ** 2), argnums=(0, 2, 3))
    abstract = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(grad).lower(*abstract).compile().as_text()


def of_float32(x: Any, w: Any, a: Any, b: Any, **options: Any) -> Any:
    return product(x, base.Float32(), {"kernel": w}, a, b, **options)


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_layer_forms_no_product_shaped_like_its_kernel(form: str) -> None:
    hlo = compiled_gradient(partial(of_float32, scale=0.4, form=form))
    assert not kernel_sized_products(hlo, {(20, 28)}, 33)


def test_kernel_of_the_fused_form_in_bfloat16_is_rounded_once_and_keeps_the_delta() -> None:
    rng = np.random.default_rng(0)
    # W as stored; factors that bfloat16 holds, and a delta of a few spacings of W in bfloat16
    w, a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((64, 96), (64, 4), (4, 96)))
    w, a, b = jnp.asarray(w), *(jnp.asarray(v, jnp.bfloat16).astype(jnp.float32) for v in (a, b))
    fused = partial(product, base=base.parse("float32"), scale=2**-8, form="fused")
    kernel = fused(jnp.eye(64, dtype=jnp.bfloat16), w={"kernel": w}, a=a, b=b)
    w, a, b, kernel = (np.asarray(v, np.float64) for v in (w, a, b, kernel))
    delta = 2.0**-8 * a @ b
    error = np.abs(kernel - (w + delta))
    assert np.all(error <= 2.0**-8 * (np.abs(w + delta) + np.abs(delta)))  # rounding of the sum and the delta
    assert np.mean(error) < np.mean(np.abs(delta)) / 4


def test_plain_autodiff_forms_the_product_that_the_fused_form_avoids() -> None:
    hlo = compiled_gradient(lambda x, w, a, b: x @ (w + 0.4 * a @ b))
    assert len(kernel_sized_products(hlo, {(20, 28)}, 33)) == 1


def llama(form: str, base_init: str = "keep") -> Any:
    """(graph, trained, frozen) of the scanned Llama."""
    blocks = lambda path, module: path[0] == "blocks"  # noqa: E731
    options = {"rank": LLAMA_RANK, "targets": blocks, "product": form, "base_init": base_init}
    model = nnx.eval_shape(lambda: Llama(LLAMA, rngs=nnx.Rngs(0)))
    flat = nnx.to_flat_state(nnx.split(model)[1])
    nnx.update(model, nnx.from_flat_state([(path, v.replace(drawn(*v.shape))) for path, v in flat]))
    return nnx.split(lower(model, **options), nnx.Param, BaseKernel)


@cache
def gradient_of_llama(form: str) -> Any:
    """The compiled gradient of its loss, and its frozen kernels."""
    graph, trained, frozen = llama(form)

    def loss(trained: Any, frozen: Any, ids: Any) -> Any:
        return nnx.merge(graph, trained, frozen).loss(ids, jnp.full(ROWS, LENGTH + 1))[0]

    ids = jax.ShapeDtypeStruct((ROWS, LENGTH + 1), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(trained, frozen, ids).compile(), frozen


@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_the_scanned_model_forms_no_product_shaped_like_a_base_kernel(form: str) -> None:
    gradient, frozen = gradient_of_llama(form)
    kernels = {leaf.shape[1:] for leaf in jax.tree.leaves(frozen)}
    assert kernels == {(20, 24), (20, 12), (24, 20), (20, 28), (28, 20)}
    hlo = gradient.as_text()
    assert not kernel_sized_products(hlo, kernels, ROWS * LENGTH)
    assert kernel_sized_products(
        hlo, {(20, 61)}, ROWS * LENGTH
    )  # the head is trained: its product is detected


def test_zero_base_gives_every_factor_of_every_layer_a_gradient() -> None:
    _, trained, frozen = llama("separate", base_init="zero")
    ids = np.random.default_rng(0).integers(0, 61, (ROWS, LENGTH + 1), dtype=np.int32)
    grads = gradient_of_llama("separate")[0](trained, frozen, ids)
    factors = [v[...] for _, v in nnx.to_flat_state(grads) if isinstance(v, nnx.LoRAParam)]
    assert len(factors) == 14 and all(np.all(np.any(np.abs(f) > 1e-9, axis=(1, 2))) for f in factors)


@pytest.mark.parametrize("base", (jnp.float32, jnp.bfloat16))
def test_merge_of_350m_needs_less_than_one_float32_kernel_of_scratch(base: Any) -> None:
    shape = (24, 1024, 2736)
    layer = nnx.eval_shape(lambda: dense(base_dtype=base))
    graph, state = nnx.split(layer)
    sides = {"kernel": shape, "lora_a": (24, 1024, 128), "lora_b": (24, 128, 2736), "bias": (24, 2736)}
    state = nnx.from_flat_state(
        (path, v.replace(jax.ShapeDtypeStruct(sides[path[0]], v.dtype)))
        for path, v in nnx.to_flat_state(state)
    )

    def merge(state: Any, key: Any) -> Any:
        return nnx.split(merge_and_reinit(nnx.merge(graph, state), key=key))[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    memory = jax.jit(merge, donate_argnums=0).lower(state, key).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 24 * 1024 * 2736 * 4
    assert memory.alias_size_in_bytes >= 24 * 1024 * 2736 * jnp.dtype(base).itemsize  # W is updated in place


def test_model_of_shapes_is_refused_in_one_line():
    model = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0))))
    with pytest.raises(
        ValueError, match=r"layers/0: its kernel is only a shape: wrap inside nnx\.eval_shape"
    ):
        wrap(model, rank=2, alpha=4.0, targets=lambda *_: True, rngs=nnx.Rngs(0))
