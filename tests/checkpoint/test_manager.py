"""A restored state equals the saved one bit for bit, on any mesh; another run's checkpoint is refused."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore as ts

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.saved import checkpoints_dir, updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.storage.writer import Writer
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any, dict[str, np.ndarray]]:
    """(workdir, program on 1 x 2 devices, flat state) of checkpoints at 0 to 4 (full-rank) and 5 to 7."""
    workdir = tmp_path_factory.mktemp("run")
    config = small.config(train__keep_every=3)
    program = Program(config, small.mesh(1, 2))
    state = program.init()
    with Checkpoints(workdir, config) as checkpoints:
        for u in range(8):
            checkpoints.save(u, state)
            if u < 7:
                state, _ = small.run(config, program, state=state, start=u, stop=u + 1)
    return workdir, program, {path: np.asarray(leaf) for path, leaf in flatten(state).items()}


def test_restored_state_equals_the_saved_one_on_any_mesh(saved: Any) -> None:
    workdir, program, flat = saved
    for other in (program, Program(program.config, small.mesh(2, 2))):
        restored = restore_newest(Writer(workdir), program.config, other.state_at)
        assert restored is not None and restored[0] == 7
        state = restored[1]
        for (path, leaf), like in zip(
            flatten(state).items(), jax.tree.leaves(other.state_at(7)), strict=True
        ):
            assert np.array_equal(np.asarray(leaf), flat[path]) and leaf.dtype == flat[path].dtype, path
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim), path


def test_last_every_nth_and_low_rank_start_checkpoints_are_kept(saved: Any) -> None:
    assert updates_saved(saved[0]) == [0, 3, 4, 5, 6, 7]  # 0, 3, 6 by keep_every, 4 is W


def test_model_of_a_checkpoint_is_read_without_a_program(saved: Any) -> None:
    workdir, _, flat = saved
    model = variables_of(workdir, 7)
    parts = {
        path.partition("/")[2]: leaf
        for path, leaf in flat.items()
        if path.startswith(("trained/", "frozen/"))
    }
    assert model.keys() == parts.keys() and "blocks/attention/q/lora_a" in model
    assert all(np.array_equal(model[path], leaf) for path, leaf in parts.items())
    assert "blocks/attention/q/lora_a" not in variables_of(workdir, 4)


@pytest.mark.parametrize("changes", [{"relora__rank": 2}, {"model__mlp": 32}, {"train__seed": 1}], ids=str)
def test_checkpoint_of_another_run_is_refused_and_not_moved(saved: Any, changes: dict[str, Any]) -> None:
    other, before = small.config(**changes), updates_saved(saved[0])
    with pytest.raises(ValueError, match=r"belongs to another run \(\w+.\w+: "):
        restore_newest(Writer(saved[0]), other, Program(other, small.mesh()).state_at)
    assert updates_saved(saved[0]) == before and not (saved[0] / "damaged").exists()


def test_state_at_w_is_before_the_low_rank_phase() -> None:
    program = Program(small.config(), small.mesh())
    assert not jax.tree.leaves(program.state_at(4).frozen)
    assert jax.tree.leaves(program.state_at(5).frozen)


def test_arrays_are_not_compressed(tmp_path: pathlib.Path) -> None:
    state = Program(small.config(), small.mesh()).init()
    with Checkpoints(tmp_path, small.config()) as checkpoints:
        checkpoints.save(0, state)
    files = {"driver": "file", "path": f"{checkpoints_dir(tmp_path) / '0' / 'state'}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": files}).result()
    headers = [store.read(key).result().value for key in store.list().result() if key.endswith(b".zarray")]
    assert len(headers) == len(flatten(state))
    assert {json.loads(header)["compressor"] for header in headers} == {None}
