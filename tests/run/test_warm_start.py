"""A run that starts from another run's full-rank checkpoint equals one with its own warm start."""

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
from relora_jax.checkpoint.saved import Checkpoint, checkpoints_dir
from relora_jax.config import Config
from relora_jax.run import warm_start
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small
from tests.support.commands import Sandbox

W = 4
ARMS = ["relora", *(pytest.param(arm, marks=pytest.mark.slow) for arm in ("lora_warm", "full"))]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A relora run with checkpoints at 0, 4 (full-rank) and 6 (low-rank)."""
    workdir, config = tmp_path_factory.mktemp("source"), small.config(train__keep_last=9)
    program, state, start = Program(config, small.mesh()), None, 0
    with Checkpoints(workdir, config) as checkpoints:
        for u in (0, W, 6):
            state, _ = small.run(config, program, state=state, start=start, stop=u)
            checkpoints.save(u, state)
            checkpoints.wait()
            start = u
    return workdir


def begin(source: pathlib.Path, arm: str = "relora", **changes: Any) -> tuple[Config, Program, Any]:
    config = small.config(arm, train__init_from=str(source), **changes)
    program = Program(config, small.mesh())
    return config, program, warm_start.load(warm_start.find(config), program)


def same(one: Any, other: Any) -> bool:
    one, other = flatten(one), flatten(other)
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("arm", ARMS)
def test_arms_with_a_shared_warm_start_equal_runs_with_their_own(source: pathlib.Path, arm: str) -> None:
    own = small.config(arm)
    whole, losses = small.run(own, Program(own, small.mesh()), stop=7)
    config, program, state = begin(source, arm)
    assert int(state.update) == W and int(state.tokens_seen[0]) > 0
    state, after = small.run(config, program, state=state, start=W, stop=7)
    assert same(state, whole) and after == losses[W:]


def test_checkpoint_without_moments_provides_only_weights(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    imported, other = tmp_path / "imported", small.config(train__seed=7)
    state = Program(other, small.mesh()).init()
    arrays = {path: leaf for path, leaf in flatten(state).items() if path.startswith("trained/")}
    with Checkpoints(imported, other) as checkpoints:
        checkpoints._write(0, arrays)
    read = Checkpoint.read

    def live_bytes() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def reading(*args: Any, **kwargs: Any) -> Any:
        before = live_bytes()
        arrays = read(*args, **kwargs)
        measured.append((before, live_bytes() - before))
        return arrays

    measured: list[tuple[int, int]] = []
    monkeypatch.setattr(Checkpoint, "read", reading)
    gc.collect()
    before = live_bytes()
    _, program, loaded = begin(imported, relora__warm_start_updates=0, optimizer__warm_up_updates=0)
    weights = sum(leaf.nbytes for leaf in arrays.values())
    [(before_read, read_bytes)] = measured
    assert before_read - before < weights / 4 and read_bytes == weights  # no weights were drawn
    assert jax.tree.structure(loaded) == jax.tree.structure(program.full_rank)
    expected = flatten(program.init()) | arrays
    assert all(np.array_equal(leaf, expected[path]) for path, leaf in flatten(loaded).items())
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(loaded.opt_state))
    with pytest.raises(ValueError, match=r"warm_start_updates is 4 and train.init_from .* at u = 0: set it"):
        begin(imported)


def test_warm_start_updates_without_a_checkpoint_are_refused_with_the_choices(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"relora.warm_start_updates is 5 .* has checkpoints at u = 0, 4, 6"):
        begin(source, relora__warm_start_updates=5)


def test_low_rank_checkpoint_is_refused(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"is in its low-rank phase at u = 6: .* at most 4"):
        begin(source, relora__warm_start_updates=6)


def test_another_model_is_refused_with_the_differences(source: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"is from another model \(model.mlp: 24 -> 32\)"):
        begin(source, model__mlp=32)
    with pytest.raises(ValueError, match=r"heads: 4 -> 8; model.kv_heads: 2 -> 4; model.head_dim: 4 -> 2"):
        begin(source, model__heads=8, model__kv_heads=4, model__head_dim=2)  # the same shapes
    begin(source, model__init_std=1.0)  # no longer matters


def test_another_tokenizer_is_refused(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    copy = pathlib.Path(shutil.copytree(source, tmp_path / "copy"))
    config = small.config(train__init_from=str(copy))
    keys = {"train": {"tokenizer": "a", "eos": 1, "split": "train"}}
    warm_start.check_tokenizer(config, keys)  # a source that does not say
    (copy / "run.json").write_text(json.dumps({"rows": {"train": {**keys["train"], "split": "train[:9]"}}}))
    warm_start.check_tokenizer(config, keys)
    for key, value in (("tokenizer", "b"), ("eos", 2)):
        with pytest.raises(ValueError, match=rf"another tokenizer \({key}: .* -> {value}\)"):
            warm_start.check_tokenizer(config, {"train": {**keys["train"], key: value}})


def test_checkpoint_without_moments_is_refused_after_update_0(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config()
    state = flatten(Program(config, small.mesh()).init())
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints._write(W, {path: leaf for path, leaf in state.items() if path.startswith("trained/")})
    with pytest.raises(ValueError, match=r"has no moments at u = 4: set relora.warm_start_updates=0"):
        begin(tmp_path)


def test_missing_or_damaged_source_is_refused_and_not_touched(
    source: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(ValueError, match=r"holds no checkpoint: pass the directory of a run"):
        begin(tmp_path)
    copy = pathlib.Path(shutil.copytree(source, tmp_path / "copy"))
    meta = checkpoints_dir(copy) / "4" / "meta" / "metadata"
    meta.write_text(meta.read_text()[:-9])
    before = sorted(map(str, copy.rglob("*")))
    with pytest.raises(ValueError, match=r"train.init_from cannot be used"):
        begin(copy)
    assert sorted(map(str, copy.rglob("*"))) == before


@pytest.mark.slow
def test_command_starts_at_w_and_ends_like_the_run_with_its_own_warm_start(tmp_path: pathlib.Path) -> None:
    sandbox = Sandbox(tmp_path)
    config = f"--config={sandbox.folder / 'toy.py'}"
    assert sandbox.train(config, workdir="own").returncode == 0
    assert sandbox.train(f"{config}:full", workdir="full").returncode == 0
    args = (config, f"--config.train.init_from={sandbox.folder / 'full'}")
    early = sandbox.train(*args, workdir="shared", KILL_AT="4 9")  # before its first save
    assert early.returncode == -9 and "starts at update 4 from" in early.stdout, early.stderr
    assert sandbox.train(*args, workdir="shared", KILL_AT="10 9").returncode == -9
    ended = sandbox.train(*args, workdir="shared")
    assert ended.returncode == 0, ended.stderr
    assert [row for row in sandbox.rows("shared") if row["update"] > W] == [
        row for row in sandbox.rows("own") if row["update"] > W
    ]
    assert [row["update"] for row in sandbox.rows("shared") if row["kind"] != "sample"][:2] == [4, 5]
    own, shared = sandbox.weights("own"), sandbox.weights("shared")
    assert all(np.array_equal(own[path], shared[path]) for path in own)
    assert saved.Checkpoint.open(checkpoints_dir(sandbox.folder / "shared") / "4").update == W
