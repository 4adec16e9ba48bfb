"""Splash attention, interpreted on CPU, is the attention that is written out: values and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from relora_jax.model import splash
from relora_jax.model.attention import attend
from relora_jax.training.sharding import on_mesh
from tests.support import small


def inputs(length: int) -> tuple[Any, Any]:
    """((q, k, v) with four and two heads, positions within documents) of two rows."""
    rng = np.random.default_rng(0)
    qkv = tuple(jnp.asarray(rng.normal(size=(2, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    starts = (length // 3, length // 7)
    return qkv, jnp.stack([jnp.r_[jnp.arange(start), jnp.arange(length - start)] for start in starts])


@pytest.mark.slow
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("length", [20, 300])  # padded to 128 and 384
def test_splash_has_the_values_and_gradients_of_attention_written_out(length: int, apart: bool) -> None:
    qkv, positions = inputs(length)
    documents = jnp.arange(length)[None] - positions if apart else None
    mask = None if documents is None else documents[:, :, None] == documents[:, None]

    def values(function: Any) -> Any:
        total = lambda *args: jnp.sum(jnp.sin(function(*args)))  # noqa: E731
        return jax.jit(jax.value_and_grad(total, (0, 1, 2)))(*qkv)

    ours = values(lambda *args: splash.attend(*args, documents, interpret=True))
    theirs = values(lambda *args: attend(*args, mask, implementation="einsum"))
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_devices_compute_their_own_rows_and_heads() -> None:
    qkv, positions = inputs(20)
    documents = jnp.arange(20)[None] - positions
    function = lambda *args: splash.attend(*args, interpret=True)  # noqa: E731
    expected = function(*qkv, documents)
    for sizes in ({"fsdp": 2, "tensor": 2}, {"fsdp": 4}):  # two rows: on each of four devices
        mesh = small.mesh(**sizes)
        args = jax.device_put((*qkv, documents), NamedSharding(mesh, PartitionSpec()))
        ours = jax.jit(on_mesh(function, mesh))(*args)
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_attend_passes_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, positions = inputs(5)
    passed: list[Any] = []
    monkeypatch.setattr(splash, "attend", lambda q, k, v, documents: passed.append(documents) or q)
    attend(*qkv, None, positions[:1], implementation="splash")
    attend(*qkv, jnp.ones((2, 5, 5), bool), positions, implementation="splash")
    assert passed[0] is None and passed[1].tolist() == [[0, 1, 1, 1, 1], [0] * 5]
