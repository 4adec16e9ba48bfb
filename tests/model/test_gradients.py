"""Gradients of every form, remat policy, attention and base type against those of plain float32 layers."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax.core import base, low_rank
from relora_jax.core.product import FORMS
from relora_jax.model.llama import REMAT, Llama
from tests.support import small

KINDS = [kind for kind in base.CHOICES if kind != "float64"]
ATTENTION = ("xla", "einsum")
POLICIES = [policy for policy in REMAT if policy != "auto"]
EVERY = list(itertools.product(FORMS, POLICIES, ATTENTION, KINDS))
# 8-bit products round x and dy, to a half of 1/127 or 2^-3 at most; all others compute in float32
ROUNDING = {"int8": 1e-2, "float8_e4m3": 2.0**-4}


def low_rank_model(form: str, remat: str, attention: str, kind: str) -> Any:
    config = small.config(model__remat=remat, model__attention=attention).model
    model = Llama(config, rngs=nnx.Rngs(0))
    options: dict[str, Any] = {"rank": 3, "alpha": 6.0, "product": form, "base_dtype": kind}
    low_rank.wrap(model, targets=lambda path, _: path[0] == "blocks", rngs=nnx.Rngs(1), **options)
    for n, (_, dense) in enumerate(low_rank.low_rank_layers(model)):
        dense.lora_b[...] = 0.1 * jax.random.normal(jax.random.key(n), dense.lora_b.shape)
    return model


def rows() -> tuple[jax.Array, jax.Array]:
    config = small.config()
    ids, lengths = small.rows(config, 0)
    return jnp.asarray(ids[0]), jnp.asarray(lengths[0])


def plain_gradients(model: Any) -> Any:
    """Of the plain model that `unwrap` makes, in float32; the factors' by the chain rule on the host."""
    layers = {
        path: (dense.lora_a[...], dense.lora_b[...], dense.scale)
        for path, dense in low_rank.low_rank_layers(model)
    }
    low_rank.unwrap(model)
    model.remat = "none"
    graph, params = nnx.split(model)
    loss = lambda params: nnx.merge(graph, params).loss(*rows())[0]  # noqa: E731
    grads = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(params)))
    flat = {"/".join(map(str, path)): np.asarray(leaf[...], np.float64) for path, leaf in grads.items()}
    for path, (a, b, scale) in layers.items():
        name = "/".join(map(str, path))
        dw = flat.pop(f"{name}/kernel")
        flat[f"{name}/lora_a"] = scale * dw @ np.asarray(b, np.float64).swapaxes(-1, -2)
        flat[f"{name}/lora_b"] = scale * np.asarray(a, np.float64).swapaxes(-1, -2) @ dw
    return flat


@pytest.mark.slow
@pytest.mark.parametrize(("form", "remat", "attention", "kind"), EVERY)
def test_gradients_are_those_of_plain_float32_layers(
    form: str, remat: str, attention: str, kind: str
) -> None:
    model = low_rank_model(form, remat, attention, kind)
    graph, trained, frozen = nnx.split(model, nnx.Param, low_rank.BaseKernel)
    loss = lambda trained: nnx.merge(graph, trained, frozen).loss(*rows())[0]  # noqa: E731
    grads = dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(trained)))
    expected = plain_gradients(model)
    assert {"/".join(map(str, path)) for path in grads} == expected.keys()
    rounding = ROUNDING.get(kind, 0.0) if form == "separate" else 0.0
    for path, leaf in grads.items():
        name = "/".join(map(str, path))
        error = np.linalg.norm(np.asarray(leaf[...], np.float64) - expected[name])
        relative = error / np.linalg.norm(expected[name])
        assert relative < (3 * rounding or 1e-5), name
