"""Opening a run locks, checks and restores once; one process writes, the others are silent."""

import pathlib
from typing import Any

import numpy as np
import pytest

from relora_jax import loop
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import Config
from relora_jax.data.stores import PrepareOptions
from relora_jax.errors import UserError
from relora_jax.run import directory, opening
from relora_jax.run.signals import Signals
from relora_jax.storage.writer import Writer
from relora_jax.training import steps
from tests.support import small
from tests.support.documents import texts, write_dataset


@pytest.fixture
def config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on a toy dataset, over the suite's 8 devices."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
    config = small.config(model__vocab_size=380, data__dataset="toy", data__tokenizer="bpe(380)")
    config.train.batch = config.train.microbatch = 8
    config.train.updates, config.train.save_every_updates = 11, 5
    return config


def run(config: Config, workdir: pathlib.Path) -> int:
    with Signals() as signals:
        return loop.run(config, workdir, PrepareOptions(), signals)


@pytest.mark.slow
def test_inactive_process_computes_the_same_and_writes_only_its_shards(
    config: Config,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(config, tmp_path / "writes") == 0
    assert "reduction" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "writes").iterdir()}
    assert names >= {"config.json", "run.json", "metrics.jsonl", "report.md", "tensorboard", "lock"}

    silent = lambda folder, active: Writer(folder, active=False)  # noqa: E731
    monkeypatch.setattr(opening, "Writer", silent)
    monkeypatch.setattr(directory, "check_is_shared", lambda *_: None)  # no process 0 holds its lock
    assert run(config, tmp_path / "silent") == 0
    assert [path.name for path in (tmp_path / "silent").iterdir()] == ["checkpoints"]
    assert capsys.readouterr() == ("", "")
    one, other = (variables_of(tmp_path / name, 11) for name in ("writes", "silent"))
    assert all(np.array_equal(one[path], other[path]) for path in one)
    assert updates_saved(tmp_path / "silent") == updates_saved(tmp_path / "writes")


def test_one_process_writes(config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def writer(folder: pathlib.Path, active: bool) -> Any:
        calls.append(active)
        raise UserError("called")

    monkeypatch.setattr(opening, "Writer", writer)
    for process in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        with (
            pytest.raises(UserError, match="called"),
            opening.open_run(config, tmp_path / "run", PrepareOptions()),
        ):
            pass
    assert calls == [True, False]


def test_refused_run_leaves_no_directory(config: Config, tmp_path: pathlib.Path) -> None:
    config.data.dataset = "nothing"
    with pytest.raises(UserError, match="nothing"):
        run(config, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_path_from_which_checkpoints_cannot_be_read_is_refused_before_anything_is_computed(
    config: Config, tmp_path: pathlib.Path
) -> None:
    before = list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"cannot be read back from a path with '\['"):
        run(config, tmp_path / "run[1]")
    config.train.init_from = str(tmp_path / "a\\b")
    with pytest.raises(UserError, match="cannot be read back from a path with"):
        run(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == before  # no rows, no tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("last", [11, pytest.param(7, id="stopped")])
def test_run_does_not_end_well_if_its_last_checkpoint_cannot_be_read_back(
    config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    def wait(self: Checkpoints) -> None:
        original(self)
        for file in (tmp_path / "run" / "checkpoints" / str(last) / "state").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:-100])

    def stopping(config: Config, u: int) -> steps.Due:
        signals.stop_requested = u + 1 == last < config.train.updates
        return due(config, u)

    original, due, signals = Checkpoints.wait, steps.due, Signals()
    with signals, monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "wait", wait)
        patch.setattr(steps, "due", stopping)
        with pytest.raises(OSError, match=f"the save failed: .*checkpoints/{last} "):
            loop.run(config, tmp_path / "run", PrepareOptions(), signals)
    assert not (tmp_path / "run" / "report.md").exists()
    assert run(config, tmp_path / "run") == 0  # from the one before
    assert (tmp_path / "run" / "damaged" / str(last)).is_dir() and updates_saved(tmp_path / "run")[-1] == 11


def test_directory_that_is_not_a_run_is_refused_and_not_touched(
    config: Config, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"config\.json: this version cannot read the saved config"):
        run(config, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.json"]


@pytest.mark.slow
def test_directory_and_warm_start_are_checked_once(
    config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module, name in ((directory, "check"), (opening.warm_start, "find"), (opening, "restore_newest")):
        call = getattr(module, name)
        spy = lambda *args, call=call, name=name: (calls.append(name), call(*args))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    assert run(config, tmp_path / "source") == 0
    config.train.init_from = str(tmp_path / "source")
    assert run(config, tmp_path / "begun") == 0
    assert calls == ["check", "restore_newest", "check", "find", "restore_newest"]
