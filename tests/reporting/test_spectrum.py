"""spectrum: the rank, singular values and rounding noise of summed updates that are built to have them."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from relora_jax.core import base
from relora_jax.reporting import spectrum
from relora_jax.training.names import LAYERS as KINDS

LAYERS, SIDE, WIDE, R, SCALE = 3, 32, 48, 4, 0.5
SHAPES = {"gate": (SIDE, WIDE), "up": (SIDE, WIDE), "down": (WIDE, SIDE)}


def start(random: np.random.Generator) -> dict[str, np.ndarray]:
    shapes = {path: (LAYERS, *SHAPES.get(kind, (SIDE, SIDE))) for kind, path in KINDS.items()}
    kernels = {path: 0.02 * random.standard_normal(shape) for path, shape in shapes.items()}
    return {f"{path}/kernel": kernel.astype(np.float32) for path, kernel in kernels.items()}


def factors(random: np.random.Generator, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layers, rows, columns = kernel.shape
    a = random.uniform(-1, 1, (layers, rows, R)) / np.sqrt(rows)
    return a.astype(np.float32), random.standard_normal((layers, R, columns)).astype(np.float32)


def relora(then: dict[str, np.ndarray], *, merges: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """A model after a low-rank phase: bases rounded to `dtype` at the start and each merge; live factors."""
    random, now = np.random.default_rng(7), {}
    for path in KINDS.values():
        base = then[f"{path}/kernel"].astype(dtype)
        for _ in range(merges):
            a, b = factors(random, base)
            base = (base.astype(np.float32) + SCALE * a @ b).astype(dtype)
        now[f"{path}/lora_a"], now[f"{path}/lora_b"] = factors(random, base)
        now[f"{path}/kernel"] = base
    return now


def ranks(then: dict[str, np.ndarray], now: dict[str, np.ndarray], *, merges: int) -> dict[str, list[int]]:
    base_dtype = now[f"{KINDS['q']}/kernel"].dtype.name
    spectra = spectrum.spectra(now, then, scale=SCALE, base_dtype=base_dtype)
    options = {"base_dtype": base_dtype, "writes": merges}
    rounding = {kind: spectrum.rounding(now[f"{path}/kernel"], **options) for kind, path in KINDS.items()}
    return {kind: spectrum.rank(values, rounding[kind]).tolist() for kind, values in spectra.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("merges", [0, 1, 3])
def test_rank_of_the_summed_update_is_r_for_each_merge_and_r_for_the_live_one(
    merges: int, dtype: type
) -> None:
    then = start(np.random.default_rng(0))
    now = relora(then, merges=merges, dtype=dtype)
    assert ranks(then, now, merges=merges) == {kind: [R * (merges + 1)] * LAYERS for kind in KINDS}


def test_without_a_tolerance_rounding_counts_as_rank() -> None:
    then = start(np.random.default_rng(0))
    spectra = spectrum.spectra(relora(then, merges=3), then, scale=SCALE, base_dtype="float32")
    assert all((spectrum.rank(values, 0.0) > 4 * R).all() for values in spectra.values())


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16", "int8", "float8_e4m3", "nf4"])
@pytest.mark.parametrize("writes", [1, 64])
def test_rounding_bound_holds_and_is_tight(base_dtype: str, writes: int) -> None:
    random, kind = np.random.default_rng(0), base.parse(base_dtype)
    kernel = jnp.asarray(0.02 * random.standard_normal((2, 64, 96)), jnp.float32)
    kernel = kind.read(kind.store(kernel))
    exact, merge = np.asarray(kernel, np.float64), jax.jit(jax.vmap(kind.round))
    for write in range(writes):
        step = 1e-3 * random.standard_normal(exact.shape)
        keys = jax.random.split(jax.random.key(write), 2)
        exact, kernel = exact + step, kind.read(merge(kernel.astype(jnp.float32) + step, keys))
    noise = np.linalg.norm(np.asarray(kernel, np.float64) - exact, ord=2, axis=(1, 2)).max()
    bound = spectrum.rounding(np.asarray(kernel), base_dtype=base_dtype, writes=writes)
    assert noise < bound < 8 * noise


def test_spectra_are_the_singular_values_the_update_was_built_with() -> None:
    random = np.random.default_rng(2)
    then = start(random)
    now = {path: kernel.copy() for path, kernel in then.items()}
    expected = {kind: np.geomspace(3 + n, 0.01, SIDE) for n, kind in enumerate(KINDS)}
    for kind, path in KINDS.items():
        rows, columns = then[f"{path}/kernel"].shape[1:]
        for layer in range(LAYERS):
            u, v = (np.linalg.qr(random.standard_normal((side, SIDE)))[0] for side in (rows, columns))
            now[f"{path}/kernel"][layer] += (layer + 1) * (u * expected[kind]) @ v.T
    spectra = spectrum.spectra(now, then, scale=SCALE, base_dtype="float32")
    for kind in KINDS:
        assert spectra[kind].shape == (LAYERS, SIDE)
        for layer in range(LAYERS):
            np.testing.assert_allclose(spectra[kind][layer], (layer + 1) * expected[kind], rtol=1e-4)


def test_live_factors_count_with_their_scale() -> None:
    then = start(np.random.default_rng(0))
    now = relora(then, merges=0)
    a, b = now["blocks/mlp/gate/lora_a"][1], now["blocks/mlp/gate/lora_b"][1]
    summed = list(spectrum.summed_updates(now, then, "gate", scale=SCALE, base_dtype="float32"))[1]
    np.testing.assert_allclose(summed, SCALE * a.astype(np.float64) @ b.astype(np.float64), atol=1e-15)


def test_base_that_starts_at_zero_is_all_update() -> None:
    then = start(np.random.default_rng(0))
    now = relora({path: np.zeros_like(kernel) for path, kernel in then.items()}, merges=2)
    keep = spectrum.spectra(now, then, scale=SCALE, base_dtype="float32")
    zero = spectrum.spectra(now, then, scale=SCALE, base_dtype="float32", base_init="zero")
    for kind in KINDS:
        assert (spectrum.rank(zero[kind], 1e-5) == 3 * R).all() and (
            spectrum.rank(keep[kind], 1e-5) == SIDE
        ).all()


def test_summed_update_of_kernels_outside_the_targets_is_now_minus_then() -> None:
    then = start(np.random.default_rng(0))
    now = relora(then, merges=1) | {"blocks/attention/q/kernel": then["blocks/attention/q/kernel"] + 1}
    del now["blocks/attention/q/lora_a"], now["blocks/attention/q/lora_b"]
    for base_init in ("keep", "zero"):
        summed = next(
            spectrum.summed_updates(now, then, "q", scale=SCALE, base_dtype="float32", base_init=base_init)
        )
        np.testing.assert_allclose(summed, 1.0, atol=1e-6)
    assert not spectrum.is_low_rank(now, "q") and spectrum.is_low_rank(now, "k")


def test_count_below_is_summed_over_layers() -> None:
    values = np.array([[3.0, 0.2, 0.0999, 0.0], [0.11, 0.09, 0.05, 0.01]])
    assert spectrum.below(values) == 5
    assert spectrum.below(values, 0.05) == 2
