"""A run killed at any moment and started again ends as if nothing had happened: bit for bit on CPU."""

import pathlib
import shutil
import signal

import numpy as np
import pytest

from relora_jax import workdir
from tests import small
from tests.commands import Place

DONE, STOPPED = 0, 75
# u = 4 starts the low-rank phase, 8, 12 and 16 begin with a restart; every third update is saved
MOMENTS = {"warm start": 2, "at its end": 4, "mid-cycle": 10, "before a restart": 12, "after a restart": 13}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With one uninterrupted run in "whole"."""
    made = Place(tmp_path_factory.mktemp("resume"))
    config = f"--config={made.folder / 'toy.py'}"
    finished = made.train(config, workdir="whole")
    assert finished.returncode == DONE, finished.stderr
    return made


def resumed(place: Place, name: str) -> None:
    """The run ends, and equals the uninterrupted one."""
    finished = place.train(f"--config={place.folder / 'toy.py'}", workdir=name)
    assert finished.returncode == DONE, finished.stderr
    assert place.rows(name) == place.rows("whole")
    weights, whole = place.weights(name), place.weights("whole")
    assert weights.keys() == whole.keys()
    assert all(np.array_equal(weights[path], whole[path]) for path in whole)


def killed(place: Place, workdir: str, u: int, number: signal.Signals, code: int) -> None:
    config = f"--config={place.folder / 'toy.py'}"
    stopped = place.train(config, workdir=workdir, KILL_AT=f"{u} {int(number)}")
    assert stopped.returncode == code, stopped.stderr


def test_run_killed_again_and_again_equals_uninterrupted_bitwise(place: Place) -> None:
    for u in MOMENTS.values():
        killed(place, "often", u, signal.SIGKILL, -signal.SIGKILL)
    resumed(place, "often")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_equals_uninterrupted_bitwise(place: Place, moment: str) -> None:
    workdir = moment.replace(" ", "_")
    killed(place, workdir, MOMENTS[moment], signal.SIGKILL, -signal.SIGKILL)
    resumed(place, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signal_finishes_the_update_saves_and_asks_to_be_started_again(
    place: Place, number: signal.Signals
) -> None:
    killed(place, number.name, 10, number, STOPPED)
    assert (place.folder / number.name / "checkpoints" / "11").is_dir()
    resumed(place, number.name)


def test_finished_run_says_so(place: Place) -> None:
    again = place.train(f"--config={place.folder / 'toy.py'}", workdir="whole")
    assert again.returncode == DONE and "is finished, 20 updates done" in again.stdout


def test_resume_under_another_result_is_refused_and_harms_nothing(place: Place) -> None:
    config, folder = f"--config={place.folder / 'toy.py'}", place.folder / "whole"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    for change, said in {
        "--config.relora.rank=2": "relora.rank: 3 -> 2",
        "--config.train.seed=1": "train.seed: 0 -> 1",
        "--config.train.microbatch=8": "train.microbatch: 4 -> 8",  # with dropout it draws other masks
    }.items():
        refused = place.train(config, change, workdir="whole")
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


def test_run_that_skips_20_updates_in_a_row_ends_with_70_and_says_why(place: Place) -> None:
    config = f"--config={place.folder / 'toy.py'}"
    words = ("--config.train.updates=32", "--config.train.log_every_updates=7")
    skipping = place.train(config, *words, workdir="skips", EMPTY_FROM="6")
    assert skipping.returncode == 70 and skipping.stderr.count("\n") == 1
    assert "20 updates in a row" in skipping.stderr and "learning rate" in skipping.stderr
    skipped = [row["skipped"] for row in place.rows("skips") if row["kind"] == "train"]
    assert skipped[:3] == [1, 8, 15]


def test_resume_on_other_rows_is_refused(tmp_path: pathlib.Path) -> None:
    rows = {split: {"dataset": "toy:1.0.0", "tokenizer": "a"} for split in ("train", "validation")}
    workdir.begin(tmp_path, small.config(), unigram_perplexity=9.0, rows=rows)
    workdir.check_rows(tmp_path, {**rows, "train": {}})  # nothing saved yet: nothing to lose
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    workdir.check_rows(tmp_path, rows)
    with pytest.raises(ValueError, match=r"train dataset: toy:1.0.0 -> toy:1.0.1"):
        workdir.check_rows(tmp_path, {**rows, "train": {"dataset": "toy:1.0.1", "tokenizer": "a"}})


def test_command_refuses_to_go_on_with_other_rows(place: Place) -> None:
    shutil.copytree(place.folder / "whole", place.folder / "moved")
    (place.folder / "moved" / "report.md").unlink()
    facts = place.folder / "moved" / "run.json"
    facts.write_text(facts.read_text().replace("toy:1.0.0", "toy:0.9.0"))
    refused = place.train(f"--config={place.folder / 'toy.py'}", workdir="moved")
    assert refused.returncode == 2 and "toy:0.9.0 -> toy:1.0.0" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_start_killed_while_it_wrote_its_config_is_no_obstacle(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.tmp").write_text("{")
    workdir.check(tmp_path, small.config())


def test_snapshot_of_the_low_rank_start_is_kept_for_ever(place: Place) -> None:
    kept = {
        int(p.name)
        for p in pathlib.Path(place.folder / "whole" / "checkpoints").iterdir()
        if p.name.isdigit()
    }
    assert kept == {4, 15, 18, 20}
