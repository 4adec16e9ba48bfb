"""What an update, an evaluation and a restart move between devices and hold on each, from compiled HLO."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from relora_jax.config import Config
from relora_jax.data.batches import Batch
from relora_jax.training.program import Program
from tests.support import hlo, small

MICROBATCH, LENGTH = 40, 12  # no other size of the model is 40, 80 or 480
MODEL = {"vocab_size": 61, "hidden": 64, "mlp": 171, "layers": 3, "heads": 4, "kv_heads": 4, "head_dim": 16}
CONFIG = small.config(
    **{f"model__{name}": size for name, size in MODEL.items()},
    relora__rank=2,
    train__batch=2 * MICROBATCH,
    train__microbatch=MICROBATCH,
)
FSDP = (1, 8, 1)
MESHES = [FSDP, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((8, 1, 1), (2, 4, 1), (2, 2, 2)))]


def compiled(config: Config, mesh: tuple[int, int, int], step: str) -> Any:
    """A step of the low-rank phase, or of the full-rank one if its name starts with "full"."""
    program = Program(config, small.mesh(*mesh))
    state = program.full_rank_on_devices if step.startswith("full") else program.low_rank_on_devices
    shape = (config.train.microbatch, LENGTH + 1)
    accumulated, rows = (config.accumulation, *shape), program.rows
    batch = Batch(
        jax.ShapeDtypeStruct(accumulated, jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct(accumulated[:2], jnp.int32, sharding=rows),
    )
    if step == "restart":
        return program._restart.lower(state, reset=True).compile()
    if step == "eval":
        first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=program.eval_rows) for x in batch[:2]]
        return program.eval_program(low=True).lower(state.trained, state.frozen, Batch(*first)).compile()
    _, train = program._update(low=not step.startswith("full"))
    return train.lower(state, batch, 1e-3).compile()


def size(variables: Any) -> int:
    """Bytes of all variables, unsharded."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


@pytest.fixture(scope="module")
def updates() -> dict[Any, Any]:
    """(compiled update, its HLO) by mesh and step; filled by the tests below."""
    return {}


def update_of(updates: dict[Any, Any], mesh: Any, step: str) -> str:
    if (mesh, step) not in updates:
        updates[mesh, step] = compiled(CONFIG, mesh, step).as_text()
    return updates[mesh, step]


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize(
    "step", ["update", *(pytest.param(s, marks=pytest.mark.slow) for s in ("full", "eval"))]
)
def test_no_device_holds_an_activation_of_the_global_batch(mesh: Any, step: str, updates: Any) -> None:
    own, whole = MICROBATCH // (mesh[0] * mesh[1]), {MICROBATCH, CONFIG.train.batch, MICROBATCH * LENGTH}
    arrays = {shape for _, shape in hlo.shapes(update_of(updates, mesh, step))}
    assert any(shape[:2] == (own, LENGTH) for shape in arrays)  # the activations can be recognized
    assert not {shape for shape in arrays if whole & set(shape)}


@pytest.mark.parametrize("mesh", [FSDP, pytest.param((2, 4, 1), marks=pytest.mark.slow)], ids=str)
def test_collectives_of_an_update_gather_bases_and_reduce_gradients(mesh: Any, updates: Any) -> None:
    state = Program(CONFIG, small.mesh(*mesh)).low_rank
    # a microbatch needs each base in its forward and in its backward pass
    necessary = CONFIG.accumulation * (2 * size(state.frozen) + size(state.trained))
    moved = sum(c.total for c in hlo.collectives(update_of(updates, mesh, "update")))
    assert 0.9 * necessary < moved <= 1.3 * necessary


@pytest.mark.parametrize(
    "mesh", [pytest.param((2, 4, 1), marks=pytest.mark.slow), pytest.param((2, 2, 2), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("step", ["update", "full"])
def test_only_gradients_of_what_is_trained_are_reduced_between_data_replicas(
    mesh: Any, step: str, updates: Any
) -> None:
    program = Program(CONFIG, small.mesh(*mesh))
    state = program.full_rank if step == "full" else program.low_rank
    between = [c for c in hlo.collectives(update_of(updates, mesh, step)) if c.crosses(mesh[0])]
    assert {c.kind for c in between} == {"all-reduce"}
    # at least a device's shards of the gradients, and no activations or weights
    own, whole = on_a_device(state.trained), size(state.trained)
    assert 0.9 * own < sum(c.total for c in between) / CONFIG.accumulation < 1.05 * whole


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_restart_holds_no_whole_kernel_on_any_device(mesh: Any) -> None:
    restart = compiled(CONFIG, mesh, "restart")
    memory, program = restart.memory_analysis(), Program(CONFIG, small.mesh(*mesh))
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    kernels = jax.tree.leaves(program.low_rank.frozen)
    one_layer = max(size(kernel) // kernel.shape[0] for kernel in kernels)
    assert held <= 1.3 * on_a_device(program.low_rank_on_devices) + one_layer
    if mesh[1] * mesh[2] > 1:
        whole = {kernel.shape for kernel in kernels}
        assert not whole & {shape for _, shape in hlo.shapes(restart.as_text())}


def on_a_device(variables: Any) -> int:
    """Bytes of the variables' shards on one device."""
    leaves = jax.tree.leaves(variables)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
