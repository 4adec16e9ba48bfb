"""A restored state equals the saved one bit for bit, on any mesh; another run's checkpoint is refused.

A save that cannot be read back is an error, at the latest when saving ends.
"""

import dataclasses
import errno
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore as ts

from relora_jax.checkpoint import saved as saved_module
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.saved import checkpoints_dir, updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.errors import UserError
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


@pytest.fixture(scope="module")
def state() -> Any:
    return Program(small.config(), small.mesh()).init()


EMBEDDING = "trained/embed/embedding"
# {name of the directory: what the error names}
IMPOSSIBLE = {
    "run[1]": "'['",
    "[!a]": "'['",
    "a*b": "'*'",
    "a?b": "'?'",
    "a\\b": r"'\\'",
    "a\udcffb": r"'\udcff'",
    "gs:/bucket/run": "'gs:/'",
    "s3:/bucket/run": "'s3:/'",
}


@pytest.mark.parametrize("name", IMPOSSIBLE, ids=ascii)
def test_path_from_which_checkpoints_cannot_be_read_is_refused(tmp_path: pathlib.Path, name: str) -> None:
    for use in (updates_saved, lambda workdir: Checkpoints(workdir, small.config())):
        with pytest.raises(UserError, match="rename that directory, or choose another path") as refused:
            use(tmp_path / name / "run")
        assert f"with {IMPOSSIBLE[name]}:" in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["/gs/run", "/s3/bucket/run"])
def test_path_that_orbax_takes_for_a_bucket_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="cannot hold checkpoints"):
        checkpoints_dir(pathlib.Path(path))


NAMES = (
    *(" a b ", "\u00fc\u65e5", "%41%2F", "a#b", "{a,b}", "~a", "a]b", "a\nb", "-a", "a:b", "'\"$;&|", "gs"),
    *("a.orbax-checkpoint-tmp", "x" * 255, "/".join(["y" * 200] * 10)),
)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_checkpoint_in_any_other_path_can_be_read_back(tmp_path: pathlib.Path, state: Any, name: str) -> None:
    with Checkpoints(tmp_path / name, small.config()) as checkpoints:
        checkpoints.save(0, state)
    variables = variables_of(tmp_path / name, 0)
    assert np.array_equal(variables["norm/scale"], np.asarray(flatten(state)["trained/norm/scale"]))


def test_dots_after_a_link_lead_where_the_system_goes(tmp_path: pathlib.Path, state: Any) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/folder")
    with Checkpoints(tmp_path / "link" / ".." / "run", small.config()) as checkpoints:
        checkpoints.save(0, state)
    assert updates_saved(tmp_path / "disk" / "run") == [0] and not (tmp_path / "run").exists()
    dict(variables_of(tmp_path / "link" / ".." / "run", 0))


def flip(checkpoint: pathlib.Path, array: np.ndarray) -> None:
    """Changes the first bit of an array on disk, where it may lie more than once."""
    old = array.tobytes()
    for file in checkpoint.glob("state/**/d/*"):
        file.write_bytes(file.read_bytes().replace(old, bytes([old[0] ^ 1]) + old[1:]))


def test_save_that_did_not_become_whole_is_an_error_at_the_next_save(
    tmp_path: pathlib.Path, state: Any
) -> None:
    for number, damage in enumerate(
        (
            lambda folder: (folder / "state" / "manifest.ocdbt").unlink(),  # as after a merge of no files
            lambda folder: folder.rename(folder.with_name("3.orbax-checkpoint-tmp")),  # not committed
            lambda folder: (folder / "meta" / "metadata").write_text("{"),
        )
    ):
        checkpoints = Checkpoints(tmp_path / str(number), small.config())
        checkpoints.save(3, state)
        checkpoints.wait()
        damage(checkpoints_dir(tmp_path / str(number)) / "3")
        with pytest.raises(OSError, match=rf"the save failed: .*{number}/checkpoints/3 "):
            checkpoints.save(8, state)
        assert 8 not in updates_saved(tmp_path / str(number))
        with pytest.raises(OSError, match="the save failed"):
            checkpoints.__exit__(None)


def test_save_that_orbax_leaves_out_is_an_error(tmp_path: pathlib.Path, state: Any) -> None:
    with Checkpoints(tmp_path, small.config()) as checkpoints:
        checkpoints.save(8, state)
        with pytest.raises(OSError, match="not saved"):
            checkpoints.save(3, state)


@pytest.mark.parametrize("at_once", [1, 2**26])
def test_last_save_is_read_back_when_saving_ends(
    tmp_path: pathlib.Path, state: Any, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr("relora_jax.checkpoint.saved._BATCH_BYTES", at_once)
    with Checkpoints(tmp_path / "intact", small.config()) as checkpoints:
        checkpoints.save(0, state)
    with (
        pytest.raises(OSError, match=f"the save failed: .* {EMBEDDING} does not match"),
        Checkpoints(tmp_path / "run", small.config()) as checkpoints,
    ):
        checkpoints.save(0, state)
        checkpoints.wait()
        flip(checkpoints_dir(tmp_path / "run") / "0", np.asarray(flatten(state)[EMBEDDING]))


def test_error_in_the_with_is_not_replaced_by_a_verification(
    tmp_path: pathlib.Path, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_module.Checkpoint, "verify", lambda self: pytest.fail("verified"))
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, small.config()) as checkpoints:
        checkpoints.save(0, state)
        raise ZeroDivisionError


def test_error_of_a_save_is_not_replaced_by_what_it_left(
    tmp_path: pathlib.Path, state: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        monkeypatch.undo()  # Orbax raises it once
        raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(OSError, match="File too large"), Checkpoints(tmp_path, small.config()) as checkpoints:
        checkpoints.save(0, state)
        checkpoints.wait()
        shutil.rmtree(checkpoints_dir(tmp_path) / "0")
        monkeypatch.setattr(checkpoints._manager, "wait_until_finished", fail)
        checkpoints.save(3, state)


def test_every_array_is_verified(tmp_path: pathlib.Path, state: Any) -> None:
    with Checkpoints(tmp_path, small.config()) as checkpoints:
        checkpoints.save(0, state)
    checkpoint = saved_module.Checkpoint.open(checkpoints_dir(tmp_path) / "0")
    for name in checkpoint.checksums:
        sums = {**checkpoint.checksums, name: checkpoint.checksums[name] ^ 1}
        with pytest.raises(saved_module.DamagedError, match=f"{name} does not match"):
            dataclasses.replace(checkpoint, checksums=sums).verify()
