"""Sides of products that tensor cores cannot read are padded where they are computed, and nowhere else."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.model import padding
from relora_jax.training.program import Program
from relora_jax.training.sharding import on_mesh
from relora_jax.training.state import flatten
from tests.support import small

ODD = {"model__mlp": 21, "relora__warm_start_updates": 0}  # and 61 ids
ARMS = {
    "full": {"arm": "full"},
    "separate, dropout": {"relora__dropout": 0.4},
    "fused": {"relora__product": "fused"},
    "int8": {"relora__base_dtype": "int8"},
}


def test_side_is_the_next_tile_for_what_is_not_aligned_in_16_bits() -> None:
    sizes = (5461, 32100, 2736, 8, 1)
    assert [padding.side(size, jnp.bfloat16) for size in sizes] == [5504, 32128, 2736, 8, 128]
    assert [padding.side(size, jnp.float32) for size in sizes] == list(sizes)
    split = lambda: jnp.zeros(padding.side(5461, jnp.bfloat16))  # noqa: E731
    assert on_mesh(split, small.mesh(tensor=2))().shape == (5461,)
    assert on_mesh(split, small.mesh(fsdp=2))().shape == (5504,)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_padding_changes_no_loss_gradient_or_draw(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's moments after one update are the gradient and its square."""

    def moved_and_updated() -> tuple[float, dict[str, Any]]:
        changes = {"model__compute_dtype": "float64", "relora__base_dtype": "float64"} | ARMS[name] | ODD
        config = small.config(model__attention="einsum", **changes)
        program = Program(config, small.mesh())
        state = small.moved(program.begin_update(0, program.init())[0], seed=1)
        state, values = program.train_step(state, small.batch(config, program, 0), 0.1)
        return float(values["loss"]), {path: np.asarray(leaf) for path, leaf in flatten(state).items()}

    with jax.enable_x64(True):
        loss, state = moved_and_updated()
        monkeypatch.setattr(padding, "side", lambda size, dtype: -(-size // 16) * 16)
        padded_loss, padded_state = moved_and_updated()
    assert padded_loss == pytest.approx(loss, rel=1e-13)
    for path, array in state.items():
        difference = np.linalg.norm(array - padded_state[path])
        assert array.shape == padded_state[path].shape and difference <= 1e-12 * np.linalg.norm(array), path


@pytest.mark.parametrize("name", ARMS)
def test_every_product_of_an_update_in_bfloat16_has_aligned_sides(name: str) -> None:
    config = small.config(model__compute_dtype="bfloat16", relora__rank=8, **ARMS[name] | ODD)
    program = Program(config, small.mesh())
    low = "full" if name == "full" else "low"
    text = program.lower(f"{low}_rank_update").as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "xbf16>" in line]
    assert len(products) > 10
    sides = {int(side) for line in products for side in re.findall(r"(?<=[<x])\d+(?=x)", line)}
    assert not {21, 61} & sides and 128 in sides


def test_layer_with_a_variable_of_another_size_stays_as_it_is() -> None:
    """As that of a packed kernel: the others are then not padded either, or their products would not fit."""
    program = Program(small.config("full", **ODD), small.mesh())
    layer = jax.eval_shape(lambda s: s.trained["blocks"], program.full_rank)

    def padded_layer(layer: Any) -> Any:
        return jax.eval_shape(lambda v: padding.padded(v, "mlp", 21, jnp.bfloat16), layer)

    for packed, expected in ((False, 128), (True, 21)):
        if packed:
            gate = layer["mlp"]["gate"]["kernel"]
            layer["mlp"]["gate"]["kernel"] = gate.replace(jax.ShapeDtypeStruct((2, 16, 11), jnp.uint8))
        to = padded_layer(layer)
        assert to["mlp"]["gate"]["kernel"].get_value().shape == (2, 16, 11 if packed else 128)
        assert to["mlp"]["down"]["kernel"].get_value().shape == (2, expected, 16)
        assert to["attention"]["q"]["kernel"].get_value().shape == (2, 16, 16)
