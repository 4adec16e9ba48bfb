"""RSO: A is drawn and frozen, B alone is trained, and restarts change the function no more than ReLoRA's."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax import FrozenFactor, LowRankDense, LowRankFactor, merge_and_reinit, wrap
from relora_jax.core import base, draw
from relora_jax.core.product import FORMS, product
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small

TOKENS, IN, OUT, RANK, ALPHA = 33, 24, 16, 5, 3.0
FROZEN = ("normal", "orthonormal")
KINDS = ("one_sided", "one_sided_orthonormal")


def drawn(*shape: int) -> Any:
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape) / 2, jnp.float32)


def layers(frozen_a: str, *, form: str = "separate", stack: int = 3) -> LowRankDense:
    linear = nnx.Linear(IN, OUT, use_bias=False, rngs=nnx.Rngs(0))
    linear.kernel.set_value(drawn(stack, IN, OUT) if stack else drawn(IN, OUT))
    options: dict[str, Any] = {"targets": lambda path, layer: True, "rngs": nnx.Rngs(1), "product": form}
    return wrap(linear, rank=RANK, alpha=ALPHA, frozen_a=frozen_a, **options)


def whole(layer: LowRankDense) -> np.ndarray:
    w, a, b = (np.asarray(v[...], np.float64) for v in (layer.kernel, layer.lora_a, layer.lora_b))
    return w + ALPHA / RANK * a @ b


@pytest.mark.parametrize("frozen_a", FROZEN)
def test_only_b_is_a_parameter(frozen_a: str) -> None:
    layer = layers(frozen_a)
    assert type(layer.lora_a) is FrozenFactor and type(layer.lora_b) is LowRankFactor
    assert [path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))] == [("lora_b",)]
    assert layer.lora_a.axes == ("layers", "in", "rank") and not np.any(layer.lora_b[...])


@pytest.mark.parametrize("frozen_a", FROZEN)
def test_merge_keeps_the_function_draws_another_frozen_a_and_zeroes_b(frozen_a: str) -> None:
    layer = layers(frozen_a)
    layer.lora_b[...] = drawn(*layer.lora_b.shape)
    before, a = whole(layer), np.asarray(layer.lora_a[...])
    merge_and_reinit(layer, key=jax.random.key(2))
    np.testing.assert_allclose(whole(layer), before, atol=1e-5)
    assert type(layer.lora_a) is FrozenFactor and not np.any(layer.lora_b[...])
    for one, other in zip(np.asarray(layer.lora_a[...]), a, strict=True):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.4
    lengths = np.linalg.norm(np.asarray(layer.lora_a[...]), axis=-2)
    np.testing.assert_allclose(lengths.mean(), np.sqrt(IN / RANK), rtol=0.15)  # U(-1/sqrt(in), ..) has 0.58


def test_normal_a_has_variance_1_over_r() -> None:
    a = np.asarray(draw.layers(draw.normal, jax.random.key(0), (4, 300, 50), jnp.float32), np.float64)
    z = np.sort(a.ravel() * np.sqrt(50))
    n = z.size
    assert abs(z.mean()) < 4 / np.sqrt(n) and abs(z.var() - 1) < 4 * np.sqrt(2 / n)
    assert abs(np.mean(z**4) - 3) < 4 * np.sqrt(96 / n)
    flat = a.reshape(4, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 5 / np.sqrt(flat.shape[1])


def test_orthonormal_a_has_orthogonal_columns_of_equal_length_and_is_isotropic() -> None:
    a = np.asarray(draw.layers(draw.orthonormal, jax.random.key(0), (2000, 6, 3), jnp.float32), np.float64)
    gram = np.einsum("lir,lis->lrs", a, a)
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3) * 6 / 3, gram.shape), atol=1e-5)
    np.testing.assert_allclose(np.mean(a @ a.transpose(0, 2, 1), axis=0), np.eye(6), atol=0.12)
    assert np.abs(a.mean(0)).max() < 5 / np.sqrt(2000)  # QR alone prefers one sign of the diagonal


def test_layers_are_drawn_one_after_another() -> None:
    """A batched LAPACK call may never end on few cores (training/ledger.py)."""
    of_layers = partial(draw.layers, draw.orthonormal, shape=(4, 24, 5), dtype=jnp.float32)
    text = jax.jit(of_layers).lower(jax.random.key(0)).as_text()
    calls = [line for line in text.splitlines() if "lapack_" in line and "custom_call" in line]
    assert calls and not any("4x24x5" in line for line in calls)


def multiply(x: Any, b: Any, *, form: str, a: Any, w: Any, dtype: Any = jnp.float32) -> Any:
    options: dict[str, Any] = {"scale": 0.6, "form": form, "frozen_a": True}
    return product(x.astype(dtype), base.parse("float32"), {"kernel": w}, a, b, **options)


@pytest.mark.parametrize("form", FORMS)
def test_product_and_its_gradients_equal_the_formula(form: str) -> None:
    x, w, a, b, dy = drawn(TOKENS, IN), drawn(IN, OUT), drawn(IN, RANK), drawn(RANK, OUT), drawn(TOKENS, OUT)
    y, pull = jax.vjp(lambda x, b: multiply(x, b, form=form, a=a, w=w), x, b)
    exact = [np.asarray(v, np.float64) for v in (x, w, a, b, dy)]
    ex, ew, ea, eb, edy = exact
    np.testing.assert_allclose(y, ex @ (ew + 0.6 * ea @ eb), atol=1e-5)
    dx, db = pull(dy)
    np.testing.assert_allclose(dx, edy @ (ew + 0.6 * ea @ eb).T, atol=1e-5)
    np.testing.assert_allclose(db, 0.6 * (ex @ ea).T @ edy, atol=1e-4)
    of_a = jax.grad(lambda a: jnp.sum(multiply(x, b, form=form, a=a, w=w) * dy))(a)
    np.testing.assert_array_equal(of_a, 0)


@pytest.mark.parametrize("form", FORMS)
def test_backward_pass_keeps_x_times_a_and_not_x(form: str) -> None:
    x, w, a, b = drawn(TOKENS, IN), drawn(IN, OUT), drawn(IN, RANK), drawn(RANK, OUT)
    _, pull = jax.vjp(lambda x, b: multiply(x, b, form=form, a=a, w=w), x, b)
    kept = {leaf.shape for leaf in jax.tree.leaves(pull)}
    assert (TOKENS, RANK) in kept and (TOKENS, IN) not in kept

    def with_trained_a(x: Any, a: Any, b: Any) -> Any:
        return product(x, base.parse("float32"), {"kernel": w}, a, b, scale=0.6, form=form)

    _, pull = jax.vjp(with_trained_a, x, a, b)
    assert (TOKENS, IN) in {leaf.shape for leaf in jax.tree.leaves(pull)}


@pytest.mark.parametrize("kind", (KINDS[0], pytest.param(KINDS[1], marks=pytest.mark.slow)))
def test_restart_changes_frozen_a_kernels_b_and_the_moments_of_b_alone(kind: str) -> None:
    config = small.config(relora__restart=kind)
    program = Program(config, small.mesh())
    u = config.low_rank_start + config.relora.cycle_updates
    state, _ = small.run(config, program, stop=u)
    before = {path: np.asarray(value) for path, value in flatten(state).items()}
    assert not any("lora_a" in path and path.startswith(("trained", "opt_state")) for path in before)
    after = flatten(program.begin_update(u, state)[0])
    changed = {path for path, value in before.items() if not np.array_equal(value, after[path])}
    layers = {path.rpartition("/")[0] for path in before if path.endswith("lora_a")}
    assert len(layers) == 7
    expected = {f"{layer}/{name}" for layer in layers for name in ("kernel", "lora_a")}
    expected |= {path for path in before if path.endswith("lora_b") or "lora_b/" in path}
    assert changed == expected


def test_published_mistake_gives_the_factors_no_gradient_before_the_first_merge() -> None:
    config = small.config(relora__restart="merge_and_reinit_late")
    program = Program(config, small.mesh())
    u = config.low_rank_start + config.relora.cycle_updates
    state, _ = small.run(config, program, stop=u)
    factors = {path: value for path, value in flatten(state).items() if "lora_" in path}
    assert len(factors) == 42 and not any(np.any(value) for value in factors.values())  # A, B, mu, nu
    state, _ = program.begin_update(u, state)
    factors = [
        value for path, value in flatten(state).items() if path.startswith("trained") and "lora_a" in path
    ]
    assert len(factors) == 7 and all(map(np.any, factors))
