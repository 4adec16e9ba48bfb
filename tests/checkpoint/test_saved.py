"""A truncated, altered or emptied checkpoint is moved away; a foreign one is refused and not touched."""

import gc
import json
import os
import pathlib
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore

from relora_jax.checkpoint import saved
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.saved import FORMAT, updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.storage.writer import Writer
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's tasks
CONFIG = small.config(train__keep_last=10)


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(CONFIG, small.mesh())


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, program: Program) -> pathlib.Path:
    """A run with checkpoints at 5 and 6."""
    workdir = tmp_path_factory.mktemp("run")
    state, _ = small.run(CONFIG, program, stop=5)
    with Checkpoints(workdir, CONFIG) as checkpoints:
        for u in (5, 6):
            jax.block_until_ready(state)
            checkpoints.save(u, state)
            if u == 5:
                state, _ = small.run(CONFIG, program, state=state, start=5, stop=6)
    return workdir


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    """Orbax's failed tasks are garbage-collected here, not in another test."""
    yield
    gc.collect()


@pytest.fixture
def run(original: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(original, tmp_path / "run"))


def step(run: pathlib.Path, u: int = 6) -> pathlib.Path:
    return run / "checkpoints" / str(u)


def each_data(step: pathlib.Path, change: Callable[[pathlib.Path], Any]) -> None:
    """Changes every data file: which of them hold live data and which overwritten data depends on timing."""
    for file in [p for p in step.glob("state/**/d/*") if p.stat().st_size > 1000]:
        change(file)


def flip(file: pathlib.Path, position: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1 << bit
    file.write_bytes(content)


def empty(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def cut(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def save_other_arrays(step: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Replaces the state's arrays and keeps the original meta."""
    arrays = {path: jnp.asarray(leaf) for path, leaf in _arrays(step).items()}
    shutil.rmtree(step / "state")
    with ocp.StandardCheckpointer() as writer:
        writer.save(step / "state", change(arrays))


def _arrays(step: pathlib.Path) -> dict[str, np.ndarray]:
    with ocp.StandardCheckpointer() as reader:
        return reader.restore(step / "state")


def forge(step: pathlib.Path, **changes: Any) -> None:
    """Changes values of the meta and its digest to match."""
    meta = json.loads((step / "meta" / "metadata").read_text())
    del meta["digest"]
    meta |= changes
    (step / "meta" / "metadata").write_text(json.dumps({**meta, "digest": saved._digest(meta)}))


NAME = "trained/norm/scale"
DAMAGE: dict[str, Callable[[pathlib.Path], Any]] = {
    "emptied": empty,
    "without its state": lambda step: shutil.rmtree(step / "state"),
    "without its meta": lambda step: shutil.rmtree(step / "meta"),
    "replaced by a file": lambda step: (shutil.rmtree(step), step.write_text("")),
    "its data cut": lambda step: each_data(step, cut),
    "its data emptied": lambda step: each_data(step, lambda file: file.write_bytes(b"")),
    "its data missing": lambda step: each_data(step, pathlib.Path.unlink),
    "a bit of its data": lambda step: each_data(step, lambda file: flip(file, file.stat().st_size // 2)),
    "the first bit of its data": lambda step: each_data(step, lambda file: flip(file, 0)),
    "its meta cut": lambda step: cut(step / "meta" / "metadata"),
    "a bit of its meta": lambda step: flip(step / "meta" / "metadata", 40),
    "a bit of a checksum": lambda step: flip(step / "meta" / "metadata", -100),
    "its array names cut": lambda step: cut(step / "state" / "_METADATA"),
    "one value": lambda step: save_other_arrays(step, lambda a: {**a, NAME: a[NAME].at[0].add(1e-6)}),
    "two values swapped": lambda step: save_other_arrays(
        step, lambda a: {**a, "trained/embed/embedding": a["trained/embed/embedding"][::-1]}
    ),
    "another type": lambda step: save_other_arrays(step, lambda a: {**a, NAME: a[NAME].astype("bfloat16")}),
    "another shape": lambda step: save_other_arrays(step, lambda a: {**a, NAME: jnp.zeros(17)}),
    "a missing array": lambda step: save_other_arrays(step, lambda a: {k: a[k] for k in a if k != NAME}),
    "an extra array": lambda step: save_other_arrays(step, lambda a: {**a, "trained/x": jnp.zeros(2)}),
    "an absolute path": lambda step: save_other_arrays(step, lambda a: {**a, "/etc/passwd": jnp.zeros(2)}),
    "a path upwards": lambda step: save_other_arrays(step, lambda a: {**a, "../../x": jnp.zeros(2)}),
    "a tree": lambda step: save_other_arrays(step, lambda a: {"trained": a}),
    "no checksums": lambda step: forge(step, checksums={}),
    "an enormous shape": lambda step: _enormous(step / "state"),
}


def _enormous(state: pathlib.Path) -> None:
    """An array of 2^50 elements, none of them written."""
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{state}/"}).result()
    header = json.loads(store[f"{NAME}/.zarray"])
    store[f"{NAME}/.zarray"] = json.dumps({**header, "shape": [2**50]}).encode()


FAST = (
    "itself a link",
    "another seed's",
    "its data cut",
    "a bit of its data",
    "another type",
)


@pytest.mark.parametrize(
    "damage", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in DAMAGE]
)
def test_damaged_checkpoint_is_moved_away_and_an_earlier_one_restored(
    run: pathlib.Path, program: Program, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](step(run))
    restored = restore_newest(Writer(run), CONFIG, program.state_at)
    assert restored is not None and restored[0] == 5 and int(restored[1].update) == 5
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and str(step(run)) in warning and str(run / "damaged" / "6") in warning
    assert updates_saved(run) == [5] and (run / "damaged" / "6").exists()
    with Checkpoints(run, CONFIG) as checkpoints:  # training and saving continue
        checkpoints.save(6, restored[1])
    assert updates_saved(run) == [5, 6]


@pytest.mark.parametrize("bit", (0, 7))
@pytest.mark.parametrize("tenth", (0, 3, 6, 9))
@pytest.mark.slow
def test_every_flipped_bit_is_noticed_or_harmless(
    run: pathlib.Path, program: Program, tenth: int, bit: int
) -> None:
    """Either the restored state is the original one (the bit was unused) or the checkpoint is moved away."""
    original = {
        path: np.asarray(leaf)
        for path, leaf in flatten(restore_newest(Writer(run), CONFIG, program.state_at)[1]).items()
    }  # type: ignore
    for file in [p for p in step(run).rglob("*") if p.is_file() and p.stat().st_size]:
        content = file.read_bytes()
        flip(file, (len(content) - 1) * tenth // 9, bit)
        restored = restore_newest(Writer(run), CONFIG, program.state_at)
        assert restored is not None
        if restored[0] == 6:
            state = {path: np.asarray(leaf) for path, leaf in flatten(restored[1]).items()}
            assert all(np.array_equal(state[path], original[path]) for path in original)
            file.write_bytes(content)
        else:
            (run / "damaged" / "6").rename(step(run))
            file.write_bytes(content)


REFUSED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "a link to a directory": (lambda step: os.symlink("/etc", step / "state" / "x"), "is a symbolic link"),
    "a link to a file": (lambda step: os.symlink("/etc/passwd", step / "meta" / "x"), "is a symbolic link"),
    "itself a link": (
        lambda step: (step.rename(step.parent.parent / "x"), os.symlink("../x", step)),
        "is a symbolic link",
    ),
    "another project's": (lambda step: (step / "model.pkl").write_bytes(b"cos\nsystem\n"), "model.pkl"),
    "another project's item": (lambda step: (step / "state").rename(step / "default"), "default"),
    "meta of other fields": (
        lambda step: (step / "meta" / "metadata").write_text('{"epoch": 3}'),
        "its meta has other fields",
    ),
    "meta that is a list": (
        lambda step: (step / "meta" / "metadata").write_text("[1]"),
        "its meta has other fields",
    ),
    "another version's": (
        lambda step: forge(step, format=99),
        f"format 99, this version reads {FORMAT}",
    ),
    "another update's": (lambda step: forge(step, update=4), "the checkpoint of update 4"),
    "a config of other fields": (
        lambda step: forge(step, config='{"name": 3}'),
        "cannot read the saved config",
    ),
    "a config that is a list": (lambda step: forge(step, config=[1]), "its meta has other fields"),
    "another seed's": (
        lambda step: forge(step, config=saved.to_json(small.config(train__seed=3))),
        "belongs to another run (train.seed: 3 -> 0",
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in REFUSED]
)
def test_foreign_checkpoint_is_refused_and_not_touched(
    run: pathlib.Path, program: Program, name: str
) -> None:
    change, message = REFUSED[name]
    change(step(run))
    before = sorted(map(str, run.rglob("*")))
    with pytest.raises(ValueError) as refused:
        restore_newest(Writer(run), CONFIG, program.state_at)
    assert message in str(refused.value) and "\n" not in str(refused.value)
    assert sorted(map(str, run.rglob("*"))) == before


def test_run_without_an_intact_checkpoint_does_not_start_over(run: pathlib.Path, program: Program) -> None:
    for u in (5, 6):
        each_data(step(run, u), cut)
    for _ in range(2):  # the second start, too, must not train from the beginning
        with pytest.raises(OSError, match=r"no checkpoint in .* is intact: .*6 cannot be read"):
            restore_newest(Writer(run), CONFIG, program.state_at)
    assert updates_saved(run) == [5, 6] and not (run / "damaged").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), MemoryError(), ValueError("Error opening [os_error_code='24']")],
    ids=["disk", "memory", "open files"],
)
def test_system_error_is_not_taken_for_damage(
    run: pathlib.Path, program: Program, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(read: Callable[..., Any]) -> Callable[..., Any]:
        """Fails for the newest checkpoint only: the earlier one would be restored if this were damage."""

        def fail(self: Any, path: pathlib.Path, *args: Any, **kwargs: Any) -> Any:
            if step(run) in path.parents:
                raise error
            return read(self, path, *args, **kwargs)

        return fail

    for method in ("restore", "metadata"):
        with monkeypatch.context() as patch:
            patch.setattr(ocp.Checkpointer, method, failing(getattr(ocp.Checkpointer, method)))
            with pytest.raises(OSError):
                restore_newest(Writer(run), CONFIG, program.state_at)
    assert updates_saved(run) == [5, 6] and not (run / "damaged").exists()


def test_other_names_in_the_checkpoints_directory_are_ignored(run: pathlib.Path, program: Program) -> None:
    for name in ("0010", "99999999999999999999", "\u00b2", "x"):
        (run / "checkpoints" / name).mkdir()
    restored = restore_newest(Writer(run), CONFIG, program.state_at)
    assert restored is not None and restored[0] == 6


def test_second_damaged_checkpoint_of_an_update_gets_its_own_name(
    run: pathlib.Path, program: Program
) -> None:
    for _ in range(2):
        each_data(step(run), cut)
        restored = restore_newest(Writer(run), CONFIG, program.state_at)
        assert restored is not None
        with Checkpoints(run, CONFIG) as checkpoints:
            checkpoints.save(6, restored[1])
    assert sorted(p.name for p in (run / "damaged").iterdir()) == ["6", "6.2"]


def test_variables_of_a_damaged_checkpoint_are_not_read(run: pathlib.Path) -> None:
    DAMAGE["one value"](step(run))
    with pytest.raises(saved.DamagedError):
        dict(variables_of(run, 6))
    assert step(run).is_dir()


def test_errors_that_orbax_repeats_for_each_file_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: messages.append(str(error.exc_value)))
    saved.quiet_orbax.__wrapped__()
    for message in (
        "a",
        "Event loop is closed",
        "Encountered error while reading array index: 0",
    ):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(message)))  # type: ignore[arg-type]
    assert messages == ["a"]
