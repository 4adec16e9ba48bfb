"""A custom choice is a single class: trains with a prune and a base type defined outside of the package."""

import pathlib
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import from_json, to_json
from relora_jax.core import base, prune
from relora_jax.storage.writer import Writer
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from relora_jax.validate import validate
from tests.support import small


class EveryNth(prune.Prune):
    """Every nth entry survives."""

    kind: ClassVar[str] = "every_nth"
    n: float

    def mask(self, statistic: Any, key: Any) -> Any:
        return jnp.broadcast_to(jnp.arange(statistic.shape[-1]) % int(self.n) == 0, statistic.shape)


class Int8(base.Base):
    """W as int8 with a scale per output channel, rounded to nearest."""

    kind: ClassVar[str] = "int8_toy"

    def store(self, w: Any) -> base.Stored:
        scale = jnp.max(jnp.abs(w), axis=-2, keepdims=True) / 127
        scale = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
        return {"kernel": jnp.round(w / scale).astype(jnp.int8), "kernel_scale": scale}

    def read(self, stored: base.Stored) -> Any:
        return stored["kernel"].astype(jnp.float32) * stored["kernel_scale"]


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(prune.CHOICES, "every_nth", EveryNth)
    monkeypatch.setitem(base.CHOICES, "int8_toy", Int8)


@pytest.mark.usefixtures("tables")
@pytest.mark.slow
@pytest.mark.parametrize("form", ["separate", "fused"])
def test_custom_choices_train_and_are_saved_and_restored(tmp_path: pathlib.Path, form: str) -> None:
    changes: dict[str, Any] = {"relora__base_dtype": "int8_toy", "relora__prune": EveryNth(3.0)}
    config = small.config(relora__product=form, relora__peak_lr=3e-2, **changes)
    validate(config, devices=1)
    assert from_json(to_json(config)) == config and str(config.relora.prune) == "every_nth(3.0)"

    program = Program(config, small.mesh())
    state, before = small.run(config, program, stop=12)
    arrays = flatten(state)
    assert arrays["frozen/blocks/attention/q/kernel"].dtype == jnp.int8
    assert arrays["frozen/blocks/attention/q/kernel_scale"].shape == (2, 1, 16)
    full, _ = small.run(small.config(), Program(small.config(), small.mesh()), stop=12)
    quantized = sum(leaf.nbytes for path, leaf in arrays.items() if path.startswith("frozen/"))
    assert quantized < 0.5 * sum(
        leaf.nbytes for path, leaf in flatten(full).items() if path.startswith("frozen/")
    )

    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(12, state)
    restored = restore_newest(Writer(tmp_path), config, program.state_at)
    assert restored is not None and restored[0] == 12
    for (path, leaf), saved in zip(flatten(restored[1]).items(), arrays.values(), strict=True):
        assert np.array_equal(np.asarray(leaf), np.asarray(saved)), path
    kernel = variables_of(tmp_path, 12)["blocks/attention/q/kernel"]
    stored = {name: arrays[f"frozen/blocks/attention/q/{name}"] for name in ("kernel", "kernel_scale")}
    assert np.array_equal(kernel, np.asarray(Int8().read(stored))) and kernel.dtype == np.float32

    state, _ = program.begin_update(12, restored[1])  # a restart
    for path, leaf in flatten(state).items():
        if "/mu/" in path and "lora" in path:
            layers = np.asarray(leaf).reshape(leaf.shape[0], -1)
            assert np.count_nonzero(layers[:, 0::3]) > 0 and not np.any(layers[:, 1::3]), path
    _, after = small.run(config, program, state=restored_copy(program, tmp_path, config), start=12)
    assert np.isfinite([*before, *after]).all() and np.mean(after) < np.mean(before[:4])


def restored_copy(program: Program, folder: pathlib.Path, config: Any) -> Any:
    restored = restore_newest(Writer(folder), config, program.state_at)
    assert restored is not None
    return restored[1]


@pytest.mark.slow
@pytest.mark.usefixtures("tables")
def test_restart_adds_the_factors_product_to_the_kernel_that_a_base_reads() -> None:
    config = small.config(relora__base_dtype="int8_toy")
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=8)
    arrays = {path: np.asarray(leaf) for path, leaf in flatten(state).items()}
    after = flatten(program.restart(state, reset=False))
    layer = "blocks/mlp/up"
    read = lambda arrays: np.asarray(  # noqa: E731
        Int8().read(
            {name: jnp.asarray(arrays[f"frozen/{layer}/{name}"]) for name in ("kernel", "kernel_scale")}
        )
    )
    a, b = (arrays[f"trained/{layer}/lora_{name}"] for name in "ab")
    expected = read(arrays) + config.relora.alpha / config.relora.rank * a @ b
    np.testing.assert_allclose(
        read(after), expected, atol=0.5 * np.asarray(after[f"frozen/{layer}/kernel_scale"]).max()
    )
    assert not np.array_equal(read(after), read(arrays)) and not np.any(after[f"trained/{layer}/lora_b"])


def test_unknown_kind_is_rejected_listing_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"relora\.base_dtype 'int8_toy' is not valid: use float32, bfloat16, float64, int8"
    ):
        validate(small.config(relora__base_dtype="int8_toy"), devices=1)
    with pytest.raises(ValueError, match=r"relora\.restart 'rolling' is not valid: use merge_and_reinit"):
        validate(small.config(relora__restart="rolling"), devices=1)
    with pytest.raises(ValueError, match=r"'every_nth\(3\.0\)' is not valid: use zero, magnitude"):
        from_json(to_json(small.config(relora__prune=EveryNth(3.0))))
