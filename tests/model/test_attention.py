"""Which implementation of attention a run uses, and that those of CPUs agree."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.model import attention
from relora_jax.model.attention import resolved
from relora_jax.training.program import Program
from tests.support import small

A100, T4, TPU, CPU, H100_OF_A_PLAN, AMD = (
    SimpleNamespace(platform=platform, compute_capability=capability)
    for platform, capability in (
        ("gpu", "8.0"),
        ("gpu", "7.5"),
        ("tpu", ""),
        ("cpu", ""),
        ("cuda", "9.0"),
        ("gpu", "gfx942"),
    )
)
SUITS = {"model__compute_dtype": "bfloat16", "model__head_dim": 64, "data__sequence_length": 512}


@pytest.mark.parametrize(
    ("device", "changes", "expected"),
    [
        (A100, {}, "cudnn"),
        (H100_OF_A_PLAN, {}, "cudnn"),
        (T4, {}, "xla"),
        (AMD, {}, "xla"),
        (TPU, {}, "splash"),
        (TPU, {"data__attend_across_documents": False}, "splash"),
        (TPU, {"data__sequence_length": 64}, "xla"),
        (TPU, {"model__compute_dtype": "float32"}, "xla"),
        (CPU, {}, "einsum"),
        (A100, {"model__compute_dtype": "float32"}, "xla"),
        (A100, {"model__head_dim": 20}, "xla"),
        (A100, {"model__head_dim": 256}, "xla"),
        (A100, {"data__sequence_length": 511}, "xla"),
        (A100, {"data__attend_across_documents": False}, "xla"),
        (A100, {"model__attention": "xla"}, "xla"),
        (CPU, {"model__attention": "einsum"}, "einsum"),
    ],
)
def test_auto_is_a_flash_kernel_only_where_it_exists_and_suits_the_run(
    device: Any, changes: dict[str, Any], expected: str
) -> None:
    assert resolved(small.config(**(SUITS | changes)), device) == expected


def test_programs_have_the_attention_of_their_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "resolved", lambda config, device: f"that of {device.platform}")
    program = Program(small.config(), small.mesh())
    for phase, state in ((program.phase, program.full_rank), (program.low_phase, program.low_rank)):
        model = phase.model(state.trained, state.frozen)
        assert model.blocks.attention.implementation == "that of cpu"


@pytest.mark.parametrize("length", [1, 2, 7, 12])
def test_einsum_equals_xla_at_every_length(length: int) -> None:
    keys = jax.random.split(jax.random.key(length), 3)
    heads = (4, 2, 2)
    q, k, v = (jax.random.normal(key, (2, length, n, 8)) for key, n in zip(keys, heads, strict=True))
    document = np.arange(length) // 5
    for mask in (None, jnp.asarray(np.tile(document[:, None] == document, (2, 1, 1)))):
        results = [attention.attend(q, k, v, mask, implementation=name) for name in ("einsum", "xla")]
        np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
