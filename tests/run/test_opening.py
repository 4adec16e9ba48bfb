"""A run's directory is locked, checked and restored once; one process of it writes, the others are silent."""

import pathlib
from typing import Any

import numpy as np
import pytest

from relora_jax import loop
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import Config
from relora_jax.data.stores import How
from relora_jax.errors import UserError
from relora_jax.run import directory, opening
from relora_jax.run.signals import Signals
from relora_jax.storage.writer import Writer
from tests.support import small
from tests.support.documents import texts, write_dataset


@pytest.fixture
def made(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run on text of toy size, over the suite's 8 devices."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
    made = small.config(model__vocab_size=380, data__dataset="toy", data__tokenizer="bpe(380)")
    made.train.batch = made.train.microbatch = 8
    made.train.updates, made.train.save_every_updates = 11, 5
    return made


def run(made: Config, workdir: pathlib.Path) -> int:
    with Signals() as signals:
        return loop.run(made, workdir, How(), signals)


def test_a_process_that_does_not_write_computes_the_same_and_leaves_its_shards_alone(
    made: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(made, tmp_path / "writes") == 0
    assert "reduction" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "writes").iterdir()}
    assert written >= {"config.json", "run.json", "metrics.jsonl", "report.md", "tensorboard", "lock"}

    silent = lambda folder, active: Writer(folder, active=False)  # noqa: E731
    monkeypatch.setattr(opening, "Writer", silent)
    assert run(made, tmp_path / "silent") == 0
    assert [path.name for path in (tmp_path / "silent").iterdir()] == ["checkpoints"]
    assert capsys.readouterr() == ("", "")
    one, other = (variables_of(tmp_path / name, 11) for name in ("writes", "silent"))
    assert all(np.array_equal(one[path], other[path]) for path in one)
    assert updates_saved(tmp_path / "silent") == updates_saved(tmp_path / "writes")


def test_one_process_writes(made: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def noted(folder: pathlib.Path, active: bool) -> Any:
        seen.append(active)
        raise UserError("seen")

    monkeypatch.setattr(opening, "Writer", noted)
    for process in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        with pytest.raises(UserError, match="seen"), opening.open_run(made, tmp_path / "run", How()):
            pass
    assert seen == [True, False]


def test_what_is_refused_leaves_no_directory(made: Config, tmp_path: pathlib.Path) -> None:
    made.data.dataset = "nothing"
    with pytest.raises(UserError, match="nothing"):
        run(made, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_what_is_no_run_is_refused_and_stays_as_it_was(made: Config, tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"config\.json: a saved config that this version cannot read"):
        run(made, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["config.json"]


def test_directory_and_warm_start_are_looked_at_once(
    made: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for module, name in ((directory, "check"), (opening.warm_start, "find"), (opening, "restore_newest")):
        call = getattr(module, name)
        spy = lambda *words, call=call, name=name: (calls.append(name), call(*words))[1]  # noqa: E731
        monkeypatch.setattr(module, name, spy)
    assert run(made, tmp_path / "source") == 0
    made.train.init_from = str(tmp_path / "source")
    assert run(made, tmp_path / "begun") == 0
    assert calls == ["check", "restore_newest", "check", "find", "restore_newest"]
