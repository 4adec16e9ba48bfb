"""Runs with each base type: trained, restarted, resumed, sharded, exported and planned."""

import pathlib
from typing import Any

import numpy as np
import pytest

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.variables import variables_of
from relora_jax.core import base, low_rank
from relora_jax.errors import UserError
from relora_jax.storage.writer import Writer
from relora_jax.training import names
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from relora_jax.validate import validate
from tests.support import small

KINDS = [kind for kind in base.CHOICES if kind not in ("float32", "float64")]
RUNS = [(kind, master) for kind in KINDS for master in ("none", "host")]
EVERY = pytest.mark.parametrize(("kind", "master"), RUNS)


def config(kind: str, master: str) -> Any:
    return small.config(relora__base_dtype=kind, relora__base_master=master)


def arrays(state: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten(state).items()}


@pytest.mark.slow
@EVERY
def test_run_learns_restarts_and_resumes_bitwise(tmp_path: pathlib.Path, kind: str, master: str) -> None:
    settings = config(kind, master)
    validate(settings, devices=1)
    program = Program(settings, small.mesh())
    state, before = small.run(settings, program, stop=12)  # before the second restart
    with Checkpoints(tmp_path, settings) as checkpoints:
        checkpoints.save(12, state)
    restored = restore_newest(Writer(tmp_path), settings, program.state_at)
    assert restored is not None
    saved = arrays(state)
    for path, leaf in flatten(restored[1]).items():
        np.testing.assert_array_equal(np.asarray(leaf), saved[path], err_msg=path)
        assert leaf.sharding == flatten(state)[path].sharding, path
    on_host = {path for path, leaf in flatten(state).items() if leaf.sharding.memory_kind == "pinned_host"}
    layers = {f"master/{layer}" for layer in names.LAYERS.values()} if master == "host" else set()
    assert on_host == layers == {path for path in saved if path.startswith("master/")}

    uninterrupted, after = small.run(settings, program, state=state, start=12)
    resumed, again = small.run(settings, program, state=restored[1], start=12)
    assert after == again and np.mean(after) < np.mean(before[:4])
    for (path, leaf), other in zip(arrays(uninterrupted).items(), arrays(resumed).values(), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=path)


@pytest.mark.slow
@EVERY
def test_exported_kernels_are_those_that_the_run_computes_with(
    tmp_path: pathlib.Path, kind: str, master: str
) -> None:
    settings = config(kind, master)
    program = Program(settings, small.mesh())
    state = small.moved(small.run(settings, program, stop=5)[0], seed=1, deviation=0.01)
    with Checkpoints(tmp_path, settings) as checkpoints:
        checkpoints.save(5, state)
    model = program.low_phase.model(state.trained, state.frozen)
    variables = variables_of(tmp_path, 5)
    for path, dense in low_rank.low_rank_layers(model):
        layer = "/".join(map(str, path))
        merged = np.stack(list(variables.merged_layers(names.kernel_of(layer))))
        np.testing.assert_array_equal(merged, dense.base.read(dense.stored) + dense.delta())
    assert not any("kernel_" in path or path.startswith("master") for path in variables)


@pytest.mark.slow
@EVERY
def test_sharded_run_agrees_with_one_device(kind: str, master: str) -> None:
    settings = config(kind, master)
    runs = []
    for mesh in (small.mesh(), small.mesh(1, 4, 1), small.mesh(1, 2, 2)):
        program = Program(settings, mesh)
        state, losses = small.run(settings, program, stop=10)
        runs.append((program.saved(state), losses))
    (one, losses), *others = runs
    for state, other in others:
        np.testing.assert_allclose(other, losses, rtol=1e-3 if "8" in kind else 1e-5)
        assert {path: leaf.shape for path, leaf in flatten(state).items()} == {
            path: leaf.shape for path, leaf in flatten(one).items()
        }


def test_master_is_on_the_host_and_no_part_of_updates() -> None:
    program = Program(config("int8", "host"), small.mesh())
    masters = {path: leaf for path, leaf in flatten(program.low_rank).items() if path.startswith("master/")}
    assert len(masters) == len(names.LAYERS)
    assert {leaf.sharding.memory_kind for leaf in masters.values()} == {"pinned_host"}
    shape = "tensor<2x16x24xf32>"  # a float32 kernel of gate
    text = program.lower("low_rank_update").as_text()
    main = next(line for line in text.splitlines() if "func.func public @main" in line)
    assert "tensor<2x16x24xi8>" in main and shape not in main
    assert shape in program.lower("restart").as_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_master": "host"}, "relora.base_master host only repeats a base_dtype of float32"),
        ({"base_master": "device"}, "relora.base_master 'device' is unknown: choose one of none, host"),
        (
            {"base_dtype": "int4"},
            "relora.base_dtype 'int4' is not valid: use float32, bfloat16, float64, int8, float8_e4m3 or nf4",
        ),
    ],
)
def test_invalid_base_is_one_line_with_the_remedy(changes: dict[str, str], message: str) -> None:
    settings = small.config(**{f"relora__{key}": value for key, value in changes.items()})
    with pytest.raises(UserError) as error:
        validate(settings, devices=1)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
