"""A run is the same on any mesh, also where `tensor` does not divide a size; so are its checkpoints."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.restore import restore
from relora_jax.config import Config
from relora_jax.core import prune
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState, flatten
from tests.support import small

# 61 pieces and 27 columns: neither 2 nor 4 divides them
SIZES = {"model__mlp": 27, "model__heads": 4, "model__kv_heads": 4, "train__microbatch": 8}
CONFIG = small.config(**SIZES, relora__prune=prune.magnitude(0.5), train__updates=14)
STOPS = (7, 10, 14)  # after the first cycle has begun, after its restart, and after the second one
MESHES = [(1, 8, 1), (8, 1, 1), (2, 2, 2), (1, 1, 4), (1, 2, 4)]


def run(mesh: tuple[int, int, int], config: Config = CONFIG) -> tuple[Program, TrainState, list[float]]:
    program = Program(config, small.mesh(*mesh))
    return program, *small.run(config, program)


@pytest.fixture(scope="module")
def one() -> tuple[Program, TrainState, list[float]]:
    """The run on one device."""
    return run((1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_run_with_restarts_is_the_same_on_any_mesh(mesh: tuple[int, int, int], one: Any) -> None:
    program, state, losses = run(mesh)
    np.testing.assert_allclose(losses, one[2], rtol=1e-5)
    saved, expected = flatten(program.saved(state)), flatten(one[1])
    for path, value in saved.items():
        assert value.shape == expected[path].shape and value.dtype == expected[path].dtype
        if path.startswith(("trained/", "frozen/")):
            difference = np.linalg.norm(np.asarray(value) - np.asarray(expected[path]))
            assert difference <= 1e-5 * np.linalg.norm(expected[path]), path
    for path, value in flatten(state).items():  # on the devices, padded with zeros
        padding = np.array(value)
        padding[tuple(map(slice, saved[path].shape))] = 0
        assert not padding.any(), path
    assert mesh[2] == 1 or flatten(state)["frozen/blocks/mlp/gate/kernel"].shape[-1] == 28


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_mesh(one: Any) -> None:
    program = Program(CONFIG, small.mesh(1, 2, 4))
    for state, expected in (
        (program.init(), one[0].init()),
        (program.start_low_rank(program.init()), one[0].start_low_rank(one[0].init())),
    ):
        for path, value in flatten(program.saved(state)).items():
            np.testing.assert_array_equal(value, flatten(expected)[path], err_msg=path)


@pytest.mark.slow
def test_checkpoint_of_one_mesh_is_continued_on_others(tmp_path: pathlib.Path, one: Any) -> None:
    losses, before = list[float](), 0
    for number, (mesh, stop) in enumerate(zip([(1, 4, 1), (2, 2, 1), (1, 1, 2)], STOPS, strict=True)):
        config = dataclasses.replace(CONFIG, mesh=dataclasses.replace(CONFIG.mesh, tensor=mesh[2]))
        program, state = Program(config, small.mesh(*mesh)), None
        if number:
            state = program.placed(restore(tmp_path, before, config, program.state_at(before)))
        state, more = small.run(config, program, state=state, start=before, stop=stop)
        with Checkpoints(tmp_path, config) as checkpoints:
            checkpoints.save(stop, program.saved(state))
        losses, before = losses + more, stop
    np.testing.assert_allclose(losses, one[2], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 2, 2)])
def test_saved_and_restored_state_is_bitwise_the_same_on_a_padded_mesh(
    mesh: tuple[int, int, int], tmp_path: pathlib.Path
) -> None:
    program = Program(CONFIG, small.mesh(*mesh))
    state = small.moved(program.start_low_rank(program.init()), seed=0)
    state = program.placed(program.saved(state))  # the noise in the padding is gone
    state = dataclasses.replace(state, update=jax.device_put(np.int32(5), state.update.sharding))
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(5, program.saved(state))
    restored = program.placed(restore(tmp_path, 5, CONFIG, program.state_at(5)))
    for path, value in flatten(restored).items():
        expected = flatten(state)[path]
        assert value.sharding == expected.sharding and np.array_equal(value, expected), path
