"""Base types: what W is rounded to, without bias at merges, how it is multiplied; masters are exact."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from relora_jax.core import base, low_rank
from relora_jax.core.merge import delta

IN, OUT = 100, 6  # of nf4's groups of 64, the second is not full
SCALED = ("int8", "float8_e4m3", "nf4")
LARGEST = {"int8": 127, "float8_e4m3": 448, "nf4": 1}
BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "float8_e4m3": 8, "nf4": 4}


def kernel(*layers: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.02, (*layers, IN, OUT)).astype(np.float32)
    w[..., 0] = 0  # an output channel without a scale
    w[..., 1] = 0.05 * np.resize([1, -1], IN) * 2.0 ** -np.linspace(0, 20, IN)
    return w


def scales(kind: str, w: np.ndarray) -> np.ndarray:
    """The scale of each entry of W [in, out], in float64."""
    group = 64 if kind == "nf4" else IN
    parts = [np.abs(w[start : start + group].astype(np.float64)) for start in range(0, IN, group)]
    largest = np.concatenate([np.broadcast_to(part.max(0), part.shape) for part in parts])
    return np.where(largest == 0, 1, largest / LARGEST[kind])


def values(kind: str) -> np.ndarray:
    """All values that the kernel can have, ascending: 16 quantiles of a normal distribution, say."""
    if kind == "int8":
        return np.arange(-127.0, 128)
    if kind == "float8_e4m3":
        every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
        return np.unique(every[np.isfinite(every)])
    quantile, end = statistics.NormalDist().inv_cdf, 0.9677083  # QLoRA's appendix E and its code
    above = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    below = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    return np.sort([*below, 0.0, *above]) / max(above)


def neighbors(kind: str, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of the type below and above each entry of W [in, out], times its scale."""
    table, scale = values(kind), scales(kind, w)
    index = np.clip(np.searchsorted(table, w / scale, side="right") - 1, 0, len(table) - 2)
    return table[index] * scale, table[index + 1] * scale


@pytest.mark.parametrize("kind", SCALED)
def test_w_is_stored_as_the_nearest_value_of_the_type(kind: str) -> None:
    w, chosen = kernel(2), base.parse(kind)
    read = np.asarray(chosen.read(chosen.store(jnp.asarray(w))))
    assert read.dtype == np.float32
    for layer, stored in zip(w, read, strict=True):
        below, above = neighbors(kind, layer)
        nearest = np.where(layer - below < above - layer, below, above)
        distance = np.abs(stored - layer) - np.abs(nearest - layer)
        assert np.abs(distance).max() < 2e-7 * np.abs(layer).max()  # the quantiles were published in float32


@pytest.mark.parametrize("kind", SCALED)
def test_merges_round_to_a_neighbor_and_are_unbiased(kind: str) -> None:
    w, chosen, draws = kernel(), base.parse(kind), 4000
    keys = jax.random.split(jax.random.key(0), draws)
    rounded = jax.jit(jax.vmap(lambda key: chosen.read(chosen.round(jnp.asarray(w), key))))(keys)
    rounded = np.asarray(rounded, np.float64)
    below, above = neighbors(kind, w)
    to_one = np.minimum(np.abs(rounded - below), np.abs(rounded - above))
    assert to_one.max() < 1e-6 * np.abs(w).max()
    deviation = np.sqrt(np.maximum((w - below) * (above - w), 0) / draws)
    off = np.abs(rounded.mean(0) - w)
    assert np.all(off < 5 * deviation + 1e-6 * np.abs(w).max())
    moved = np.sum(rounded.mean(0) - w)
    assert abs(moved) < 4 * np.sqrt(np.sum(deviation**2)) + 1e-6


@pytest.mark.parametrize("kind", SCALED)
def test_largest_value_stays_whatever_the_noise(kind: str) -> None:
    chosen: Any = base.parse(kind)
    largest = jnp.full((1, 1), chosen.largest, jnp.float32)
    for noise in (0.0, 0.5, 1 - 2.0**-24):  # the sum with the last is rounded up
        assert chosen.values(chosen.rounded(largest, jnp.float32(noise))) == largest


@pytest.mark.parametrize("kind", BITS)
def test_bits_per_weight(kind: str) -> None:
    stored = base.parse(kind).store(jnp.asarray(kernel(2)))
    assert stored["kernel"].shape == (2, IN, OUT)
    bits = 4 if stored["kernel"].dtype == jnp.int4 else 8 * stored["kernel"].dtype.itemsize
    assert bits == BITS[kind]
    assert all(part.ndim == 3 for part in stored.values())


@pytest.mark.parametrize("kind", SCALED)
def test_weights_that_are_not_finite_stay_so(kind: str) -> None:
    w, chosen = jnp.asarray(kernel()).at[3, 2].set(jnp.nan), base.parse(kind)
    for stored in (chosen.store(w), chosen.round(w, jax.random.key(0))):
        assert np.isnan(np.asarray(chosen.read(stored))[3, 2])


def in_8_bits(kind: str, x: np.ndarray) -> np.ndarray:
    """x [..., n] with each token rounded to 8 bits, in float64."""
    scale = np.abs(x).max(-1, keepdims=True) / LARGEST[kind]
    table = values(kind)
    return table[np.abs((x / scale)[..., None] - table).argmin(-1)] * scale


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("int8", "float8_e4m3"))
def test_product_and_dx_are_those_of_values_in_8_bits(kind: str, dtype: str) -> None:
    chosen, rng = base.parse(kind), np.random.default_rng(1)
    stored = chosen.store(jnp.asarray(kernel()))
    x, dy = (jnp.asarray(rng.normal(size=(2, 3, size)), dtype) for size in (IN, OUT))
    y, pull = jax.vjp(lambda x: chosen.multiply(x, stored), x)
    (dx,) = pull(dy)
    assert y.dtype == dx.dtype == dtype
    scale = np.asarray(stored["kernel_scale"], np.float64)
    w = np.asarray(stored["kernel"].astype(jnp.float32), np.float64)
    exact_x, exact_dy = (np.asarray(v.astype(jnp.float32), np.float64) for v in (x, dy))
    expected = {"y": in_8_bits(kind, exact_x) @ w * scale, "dx": in_8_bits(kind, exact_dy * scale) @ w.T}
    rounding = 2e-6 if dtype == "float32" else 2.0**-8
    for name, value in (("y", y), ("dx", dx)):
        error = np.asarray(value.astype(jnp.float32), np.float64) - expected[name]
        assert np.linalg.norm(error) < rounding * np.linalg.norm(expected[name]), name


def test_8_bit_kernel_is_multiplied_in_8_bits_forward_and_for_dx() -> None:
    chosen = base.parse("int8")
    stored = chosen.store(jnp.asarray(kernel()))
    loss = lambda x: jnp.sum(jnp.sin(chosen.multiply(x, stored)))  # noqa: E731
    text = jax.jit(jax.grad(loss)).lower(jnp.ones((4, IN))).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2 and all("xi8>" in line and "xi32>" in line for line in products)


def layer_of(kind: str, *, master: bool) -> low_rank.LowRankDense:
    linear = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel[...] = jnp.asarray(kernel())
    options: dict[str, Any] = {"base_dtype": kind, "base_master": master}
    return low_rank.LowRankDense(linear, rank=2, alpha=4.0, key=jax.random.key(0), **options)


@pytest.mark.parametrize("kind", ("bfloat16", *SCALED))
def test_master_of_100_restarts_equals_a_float32_kernel_bit_for_bit(kind: str) -> None:
    layers = [layer_of("float32", master=False), layer_of(kind, master=True)]
    rng = np.random.default_rng(2)
    for n in range(100):
        b = jnp.asarray(rng.normal(0, 1e-5, (2, OUT)), jnp.float32)
        for layer in layers:
            layer.lora_b[...] = b
            low_rank.merge_and_reinit(layer, key=jax.random.key(n))
    exact, quantized = layers
    np.testing.assert_array_equal(quantized.master[...], exact.kernel[...])
    assert not np.array_equal(exact.kernel[...], kernel())
    nearest = quantized.base.store(exact.kernel[...])
    for name, part in quantized.stored.items():
        np.testing.assert_array_equal(np.asarray(part), np.asarray(nearest[name]))


def test_masters_can_be_kept_apart_between_merges() -> None:
    whole, apart = layer_of("int8", master=True), layer_of("int8", master=True)
    masters = low_rank.take_masters(apart)
    assert list(masters) == ["the model"] and apart.master is None
    for layer in (whole, apart):
        layer.lora_b[...] = jnp.ones((2, OUT))
    expected = whole.master[...] + delta(whole.lora_a[...], whole.lora_b[...], whole.scale)
    for layer in (whole, low_rank.give_masters(apart, masters)):
        low_rank.merge_and_reinit(layer, key=jax.random.key(1))
        np.testing.assert_array_equal(layer.master[...], expected)


@pytest.mark.parametrize("form", ("separate", "fused"))
@pytest.mark.parametrize("kind", BITS)
def test_wrapped_and_unwrapped_layers_agree(kind: str, form: str) -> None:
    """y = x @ (W + scale * A @ B) with the W that is read, up to the rounding of x to 8 bits."""
    linear = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    model = nnx.Sequential(linear)
    options: dict[str, Any] = {"rank": 2, "alpha": 4.0, "base_dtype": kind, "product": form}
    low_rank.wrap(model, targets=lambda path, layer: True, rngs=nnx.Rngs(1), **options)
    dense = model.layers[0]
    dense.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(3), (2, OUT))
    x = jax.random.normal(jax.random.key(4), (3, IN))
    y = model(x)
    expected = low_rank.unwrap(model)(x)
    eight_bit = form == "separate" and isinstance(base.parse(kind), base.Int8 | base.Float8)
    rounding = {"int8": 0.5 / 127 * 3, "float8_e4m3": 2.0**-4}[kind] if eight_bit else 2e-6
    assert np.linalg.norm(y - expected) < rounding * np.linalg.norm(expected)
    assert not eight_bit or np.linalg.norm(y - expected) > 1e-5 * np.linalg.norm(expected)
