"""The loss and its gradients are those of the logits, though these never exist all at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from relora_jax.model import loss, padding
from relora_jax.model.loss import token_loss
from relora_jax.planning.hlo import costs
from relora_jax.training.sharding import on_mesh
from tests.support import hlo, small

VOCAB, WIDTH = 61, 8
LENGTHS = np.array([10, 1, 7, 11])  # of rows with 10 targets


def inputs(dtype: Any = np.float32) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(4, 10, WIDTH)), rng.normal(size=(WIDTH, VOCAB))
    return (
        *(jnp.asarray(v, dtype) for v in (x, kernel)),
        jnp.asarray(rng.integers(0, VOCAB, (4, 11))),
        jnp.asarray(LENGTHS),
    )


def reference(x: Any, kernel: Any, ids: Any) -> tuple[Any, Any, Any]:
    """(nats, dx, dW) in float64: d nats / d logits = softmax(logits) - [target] where the target counts."""
    x, kernel, ids = np.asarray(x, np.float64), np.asarray(kernel, np.float64), np.asarray(ids)
    odds = np.exp(x @ kernel)
    softmax = odds / odds.sum(-1, keepdims=True)
    d, nats = np.zeros_like(softmax), 0.0
    for row, length in enumerate(LENGTHS):
        for i in range(length - 1):
            d[row, i] = softmax[row, i]
            d[row, i, ids[row, i + 1]] -= 1
            nats -= np.log(softmax[row, i, ids[row, i + 1]])
    return nats, d @ kernel.T, np.einsum("bld,blv->dv", x, d)


def gradients(*args: Any) -> Any:
    return jax.value_and_grad(token_loss, (0, 1), has_aux=True)(*args)


@pytest.mark.parametrize(
    ("chunk", "side"), [(1, VOCAB), (12, VOCAB), (1024, VOCAB), (12, 64)]
)  # 10, 4 (padded to 12 positions), 1 and 4 chunks; the last with a padded vocabulary
def test_loss_and_gradients_equal_the_reference(
    chunk: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    monkeypatch.setattr(padding, "side", lambda size, dtype: side)
    with jax.enable_x64(True):
        args = inputs(np.float64)
        (nats, count), (dx, dw) = jax.jit(gradients)(*args)
        assert int(count) == np.sum(LENGTHS - 1)
        for ours, theirs in zip((nats, dx, dw), reference(*args[:3]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)
        assert float(token_loss(*args)[0]) == pytest.approx(
            float(nats), rel=1e-13
        )  # as evaluations compute it
        twice, _ = jax.grad(lambda *v: 2 * token_loss(*v, *args[2:])[0], (0, 1))(*args[:2])
        np.testing.assert_allclose(twice, 2 * dx, rtol=1e-12)


def test_gradients_of_bfloat16_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 12)
    x, kernel, *rest = inputs()
    (nats, _), (dx, dw) = gradients(x.astype(jnp.bfloat16), kernel, *rest)
    assert (nats.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    # of the rounded values, up to rounding d once
    expected = reference(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), rest[0])
    for ours, theirs in zip((nats, dx, dw), expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= 2**-8 * np.linalg.norm(theirs)
    assert np.any(dw != dw.astype(jnp.bfloat16))


@pytest.mark.parametrize("gradient", [True, False])
def test_logits_of_one_chunk_exist_at_once(gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 8)
    step = gradients if gradient else token_loss
    text = jax.jit(step).lower(*inputs()).compile().as_text()
    sizes = {np.prod(shape) for _, shape in hlo.shapes(text) if VOCAB in shape and WIDTH not in shape}
    assert max(sizes) == 8 * VOCAB


def test_more_rows_than_a_chunk_has_are_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 1)
    text = jax.jit(gradients).lower(*inputs()).compile().as_text()
    assert costs(text, slice_size=1).matmul_flops == 3 * 2 * 4 * 10 * WIDTH * VOCAB


@pytest.mark.parametrize("mesh", [(2, 2, 1), pytest.param((1, 2, 2), marks=pytest.mark.slow)])
def test_devices_compute_the_loss_of_their_own_rows(
    mesh: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 4)
    devices = small.mesh(*mesh)
    args = jax.device_put(inputs(), NamedSharding(devices, PartitionSpec()))
    compiled = jax.jit(on_mesh(gradients, devices)).lower(*args).compile()
    for ours, theirs in zip(*map(jax.tree.leaves, (compiled(*args), gradients(*inputs()))), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    reduced = [c for c in hlo.collectives(compiled.as_text()) if c.kind == "all-reduce"]
    assert all(c.times == 1 for c in reduced if (WIDTH, VOCAB) in c.shapes)  # not once for each chunk
