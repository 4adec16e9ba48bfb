"""A run that begins with another run's full-rank checkpoint is the run that had trained it itself."""

import gc
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

from relora_jax.checkpoint import saved
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.saved import Saved, checkpoints_dir
from relora_jax.config import Config
from relora_jax.run import warm_start
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small
from tests.support.commands import Place

W = 4
ARMS = ["relora", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("lora_warm", "full"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A relora run with checkpoints at 0, 4 (full-rank) and 6 (low-rank)."""
    workdir, made = tmp_path_factory.mktemp("source"), small.config(train__keep_last=9)
    program, state, done = Program(made, small.mesh()), None, 0
    with Checkpoints(workdir, made) as checkpoints:
        for u in (0, W, 6):
            state, _ = small.run(made, program, state=state, start=done, stop=u)
            checkpoints.save(u, state)
            checkpoints.wait()
            done = u
    return workdir


def begun(source: pathlib.Path, arm: str = "relora", **changes: Any) -> tuple[Config, Program, Any]:
    made = small.config(arm, train__init_from=str(source), **changes)
    program = Program(made, small.mesh())
    return made, program, warm_start.load(warm_start.find(made), program)


def same(one: Any, other: Any) -> bool:
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_that_share_a_warm_start_are_the_runs_that_had_their_own(source: pathlib.Path, arm: str) -> None:
    own = small.config(arm)
    whole, losses = small.run(own, Program(own, small.mesh()), stop=7)
    made, program, state = begun(source, arm)
    assert int(state.update) == W and int(state.tokens_seen[0]) > 0
    state, after = small.run(made, program, state=state, start=W, stop=7)
    assert same(state, whole) and after == losses[W:]


def test_checkpoint_without_moments_gives_weights_alone(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported, other = tmp_path / "imported", small.config(train__seed=7)
    state = Program(other, small.mesh()).init()
    arrays = {path: leaf for path, leaf in flatten(state).items() if path.startswith("trained/")}
    with Checkpoints(imported, other) as checkpoints:
        checkpoints._write(0, arrays)
    read = Saved.read

    def bytes_there() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def reading(*words: Any, **how: Any) -> Any:
        before = bytes_there()
        found = read(*words, **how)
        read_and_drawn.append((before, bytes_there() - before))
        return found

    read_and_drawn: list[tuple[int, int]] = []
    monkeypatch.setattr(Saved, "read", reading)
    gc.collect()
    before = bytes_there()
    _, program, begun_state = begun(imported, relora__warm_start_updates=0, optimizer__warm_up_updates=0)
    weights = sum(leaf.nbytes for leaf in arrays.values())
    [(drawn, there)] = read_and_drawn
    assert drawn - before < weights / 4 and there == weights  # none were drawn beside those that are read
    assert jax.tree.structure(begun_state) == jax.tree.structure(program.full_rank)
    expected = flatten(program.init()) | arrays
    assert all(np.array_equal(leaf, expected[path]) for path, leaf in flatten(begun_state).items())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(begun_state.opt_state))
    with pytest.raises(ValueError, match=r"warm_start_updates is 4 and train.init_from .* at u = 0: set it"):
        begun(imported)


def test_w_that_is_not_the_checkpoints_u_is_refused_with_both(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"relora.warm_start_updates is 5 .* has checkpoints at u = 0, 4, 6"):
        begun(source, relora__warm_start_updates=5)


def test_low_rank_checkpoint_is_refused(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"at u = 6 is of its low-rank phase, which began at 4"):
        begun(source, relora__warm_start_updates=6)


def test_another_model_is_refused_by_name(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"is of another model \(model.mlp: 24 -> 32\)"):
        begun(source, model__mlp=32)
    with pytest.raises(ValueError, match=r"heads: 4 -> 8; model.kv_heads: 2 -> 4; model.head_dim: 4 -> 2"):
        begun(source, model__heads=8, model__kv_heads=4, model__head_dim=2)  # the same shapes
    begun(source, model__init_std=1.0)  # what no longer matters


def test_another_tokenizer_is_refused(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = pathlib.Path(shutil.copytree(source, tmp_path / "copy"))
    made = small.config(train__init_from=str(copy))
    keys = {"train": {"tokenizer": "a", "eos": 1, "split": "train"}}
    warm_start.check_tokenizer(made, keys)  # a source that does not say
    (copy / "run.json").write_text(json.dumps({"rows": {"train": {**keys["train"], "split": "train[:9]"}}}))
    warm_start.check_tokenizer(made, keys)
    for key, value in (("tokenizer", "b"), ("eos", 2)):
        with pytest.raises(ValueError, match=rf"another tokenizer \({key}: .* -> {value}\)"):
            warm_start.check_tokenizer(made, {"train": {**keys["train"], key: value}})


def test_checkpoint_without_moments_begins_at_0_alone(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    made = small.config()
    state = flatten(Program(made, small.mesh()).init())
    with Checkpoints(tmp_path, made) as checkpoints:
        checkpoints._write(W, {path: leaf for path, leaf in state.items() if path.startswith("trained/")})
    with pytest.raises(ValueError, match=r"no moments at u = 4: only at u = 0"):
        begun(tmp_path)


def test_no_run_and_a_damaged_one_are_refused_and_left_as_they_are(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint: name the directory of a run"):
        begun(tmp_path)
    copy = pathlib.Path(shutil.copytree(source, tmp_path / "copy"))
    meta = checkpoints_dir(copy) / "4" / "meta" / "metadata"
    meta.write_text(meta.read_text()[:-9])
    before = sorted(map(str, copy.rglob("*")))
    with pytest.raises(ValueError, match=r"train.init_from cannot be used"):
        begun(copy)
    assert sorted(map(str, copy.rglob("*"))) == before


@pytest.mark.slow
def test_command_begins_at_w_and_ends_like_the_run_with_its_own_warm_start(tmp_path: pathlib.Path) -> None:
    place = Place(tmp_path)
    config = f"--config={place.folder / 'toy.py'}"
    assert place.train(config, workdir="own").returncode == 0
    assert place.train(f"{config}:full", workdir="full").returncode == 0
    words = (config, f"--config.train.init_from={place.folder / 'full'}")
    early = place.train(*words, workdir="shared", KILL_AT="4 9")  # before its first save
    assert early.returncode == -9 and "begins at update 4 with" in early.stdout, early.stderr
    assert place.train(*words, workdir="shared", KILL_AT="10 9").returncode == -9
    ended = place.train(*words, workdir="shared")
    assert ended.returncode == 0, ended.stderr
    assert [row for row in place.rows("shared") if row["update"] > W] == [
        row for row in place.rows("own") if row["update"] > W
    ]
    assert [row["update"] for row in place.rows("shared") if row["kind"] != "sample"][:2] == [4, 5]
    own, shared = place.weights("own"), place.weights("shared")
    assert all(np.array_equal(own[path], shared[path]) for path in own)
    assert saved.Saved.open(checkpoints_dir(place.folder / "shared") / "4").update == W
