"""A run killed at any moment and resumed ends like an uninterrupted one: bit for bit on CPU."""

import errno
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import pytest

from relora_jax.checkpoint.saved import updates_saved
from relora_jax.errors import UserError
from relora_jax.run import directory
from relora_jax.storage.writer import Writer
from tests.support import small
from tests.support.commands import Sandbox

DONE, STOPPED = 0, 75
# u = 4 starts the low-rank phase, 8, 12 and 16 begin with a restart; every third update is saved
MOMENTS = {"warm start": 2, "at its end": 4, "mid-cycle": 10, "before a restart": 12, "after a restart": 13}


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """With an uninterrupted run in "whole"."""
    sandbox = Sandbox(tmp_path_factory.mktemp("resume"))
    finished = sandbox.train(f"--config={sandbox.folder / 'toy.py'}", workdir="whole")
    assert finished.returncode == DONE, finished.stderr
    return sandbox


def resume(sandbox: Sandbox, name: str) -> None:
    """Resumes the run to its end and compares it with the uninterrupted one."""
    finished = sandbox.train(f"--config={sandbox.folder / 'toy.py'}", workdir=name)
    assert finished.returncode == DONE, finished.stderr
    assert sandbox.rows(name) == sandbox.rows("whole")
    weights, whole = sandbox.weights(name), sandbox.weights("whole")
    assert weights.keys() == whole.keys()
    assert all(np.array_equal(weights[path], whole[path]) for path in whole)


def kill(sandbox: Sandbox, workdir: str, u: int, number: signal.Signals, code: int) -> None:
    config = f"--config={sandbox.folder / 'toy.py'}"
    stopped = sandbox.train(config, workdir=workdir, KILL_AT=f"{u} {int(number)}")
    assert stopped.returncode == code, stopped.stderr


@pytest.mark.slow
def test_run_killed_repeatedly_equals_uninterrupted_bitwise(sandbox: Sandbox) -> None:
    for u in MOMENTS.values():
        kill(sandbox, "often", u, signal.SIGKILL, -signal.SIGKILL)
    resume(sandbox, "often")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_resume_equals_uninterrupted_bitwise(sandbox: Sandbox, moment: str) -> None:
    workdir = moment.replace(" ", "_")
    kill(sandbox, workdir, MOMENTS[moment], signal.SIGKILL, -signal.SIGKILL)
    resume(sandbox, workdir)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signal_finishes_the_update_and_saves_and_the_run_can_be_resumed(
    sandbox: Sandbox, number: signal.Signals
) -> None:
    kill(sandbox, number.name, 10, number, STOPPED)
    assert (sandbox.folder / number.name / "checkpoints" / "11").is_dir()
    resume(sandbox, number.name)


@pytest.mark.slow
def test_signal_in_an_evaluation_saves_and_postpones_it_to_the_next_start(sandbox: Sandbox) -> None:
    config = f"--config={sandbox.folder / 'toy.py'}"
    for u in ("0", "5", "20"):  # of these, only 20 is saved by cadence
        stopped = sandbox.train(config, workdir="in_evaluation", TERM_IN=u)
        assert stopped.returncode == STOPPED, stopped.stderr
        assert stopped.stdout.count("signal in an evaluation") == 1  # and no batch after it
        assert f"stopped and saved after update {u}" in stopped.stdout
        assert updates_saved(sandbox.folder / "in_evaluation")[-1] == int(u)
        evaluated = [row["update"] for row in sandbox.rows("in_evaluation") if row["kind"] == "eval"]
        assert int(u) not in evaluated
    resume(sandbox, "in_evaluation")


def test_finished_run_is_reported_as_finished(sandbox: Sandbox) -> None:
    again = sandbox.train(f"--config={sandbox.folder / 'toy.py'}", workdir="whole")
    assert again.returncode == DONE and "is finished, 20 updates done" in again.stdout


def test_resume_with_settings_that_change_the_result_is_refused(sandbox: Sandbox) -> None:
    config, folder = f"--config={sandbox.folder / 'toy.py'}", sandbox.folder / "whole"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    for change, message in {
        "--config.relora.rank=2": "relora.rank: 3 -> 2",
        "--config.train.seed=1": "train.seed: 0 -> 1",
        "--config.train.microbatch=8": "train.microbatch: 4 -> 8",  # with dropout, the masks would differ
    }.items():
        refused = sandbox.train(config, change, workdir="whole")
        assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_run_that_skips_20_updates_in_a_row_exits_with_70_and_a_message(sandbox: Sandbox) -> None:
    config = f"--config={sandbox.folder / 'toy.py'}"
    args = ("--config.train.updates=32", "--config.train.log_every_updates=7")
    skipping = sandbox.train(config, *args, workdir="skips", EMPTY_FROM="6")
    assert skipping.returncode == 70 and skipping.stderr.count("\n") == 1
    assert "20 updates in a row" in skipping.stderr and "learning rate" in skipping.stderr
    skipped = [row["skipped"] for row in sandbox.rows("skips") if row["kind"] == "train"]
    assert skipped[:3] == [1, 8, 15]


def test_resume_on_other_rows_is_refused(tmp_path: pathlib.Path) -> None:
    rows = {split: {"dataset": "toy:1.0.0", "tokenizer": "a"} for split in ("train", "validation")}
    directory.begin(Writer(tmp_path), small.config(), unigram_perplexity=9.0, rows=rows)
    directory.check_rows(tmp_path, {**rows, "train": {}})  # nothing saved yet: nothing to lose
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    directory.check_rows(tmp_path, rows)
    with pytest.raises(ValueError, match=r"train dataset: toy:1.0.0 -> toy:1.0.1"):
        directory.check_rows(tmp_path, {**rows, "train": {"dataset": "toy:1.0.1", "tokenizer": "a"}})
    (tmp_path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"run\.json does not say what the run was trained on"):
        directory.check_rows(tmp_path, rows)


def test_dataset_version_may_be_added_to_the_setting_but_not_changed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(dataset: str) -> None:
        directory.check(tmp_path / "run", small.config(data__dataset=dataset))

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "run" / "checkpoints" / "4").mkdir(parents=True)
    rows = {"train": {"dataset": "toy:1.0.0"}}
    directory.begin(Writer(tmp_path / "run"), small.config(data__dataset="toy"), rows=rows)
    for version in ("1.0.0", "1.1.0"):
        check("toy:1.0.0")
        check("toy")
        (tmp_path / "tfds" / "toy" / version).mkdir(parents=True)
        (tmp_path / "tfds" / "toy" / version / "dataset_info.json").touch()
    for dataset in ("toy", "toy:1.1.0"):
        with pytest.raises(
            ValueError, match=r"toy:1\.0\.0 -> toy:1\.1\.0.: set --config\.data\.dataset=toy:1\.0\."
        ):
            check(dataset)
    check("toy:1.0.0")
    (tmp_path / "run" / "checkpoints" / "16").mkdir()  # nothing is left to train
    check("toy")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"name": 3}', "[" * 99_999, '{"relora": {"prune": 5}}', "\xff\0"]
)
def test_damaged_config_or_facts_are_refused_in_one_line(tmp_path: pathlib.Path, text: str) -> None:
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    for name, read in {
        "config.json": lambda: directory.check(tmp_path, small.config()),
        "run.json": lambda: directory.check_rows(tmp_path, {}),
    }.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=name) as refused:
            read()
        assert "\n" not in str(refused.value)


def test_command_refuses_to_resume_with_other_rows(sandbox: Sandbox) -> None:
    shutil.copytree(sandbox.folder / "whole", sandbox.folder / "moved")
    (sandbox.folder / "moved" / "report.md").unlink()
    facts = sandbox.folder / "moved" / "run.json"
    facts.write_text(facts.read_text().replace("toy:1.0.0", "toy:0.9.0"))
    refused = sandbox.train(f"--config={sandbox.folder / 'toy.py'}", workdir="moved")
    assert refused.returncode == 2 and "toy:0.9.0 -> toy:1.0.0" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_run_starts_after_a_kill_while_the_config_was_written(tmp_path: pathlib.Path) -> None:
    for name in ("config.tmp", "config.json.1.new", "lock"):
        (tmp_path / name).write_text("{")
    with directory.locked(Writer(tmp_path), small.config()):
        assert not (tmp_path / "config.json.1.new").exists()


def test_unwritable_directory_is_refused(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    def full(**_: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with (
        pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): use another"),
        directory.locked(Writer(tmp_path), small.config()),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_refused_run_leaves_no_lock(tmp_path: pathlib.Path) -> None:
    for workdir in (tmp_path / "new", tmp_path):
        with pytest.raises(UserError, match="no"), directory.locked(Writer(workdir), small.config()):
            raise UserError("no")
    assert not list(tmp_path.iterdir())


def test_temporary_file_of_a_report_is_not_removed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "report.md.7.new").touch()
    with directory.locked(Writer(tmp_path), small.config()):
        assert (tmp_path / "report.md.7.new").exists()


@pytest.mark.slow
@pytest.mark.ci
def test_unfinished_save_is_removed_at_the_next_start(sandbox: Sandbox) -> None:
    kill(sandbox, "half", 10, signal.SIGKILL, -signal.SIGKILL)
    half = sandbox.folder / "half/checkpoints/7.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "part").write_bytes(bytes(9))
    resume(sandbox, "half")
    assert not half.exists()


def test_snapshot_of_the_low_rank_start_is_never_deleted(sandbox: Sandbox) -> None:
    assert updates_saved(sandbox.folder / "whole") == [4, 15, 18, 20]


@pytest.mark.slow
def test_second_process_on_a_workdir_is_refused(sandbox: Sandbox) -> None:
    first = sandbox.start(f"--config={sandbox.folder / 'toy.py'}", workdir="locked", HANG_AT="6")
    wait_for(first, "hangs")
    second = sandbox.train(f"--config={sandbox.folder / 'toy.py'}", workdir="locked")
    assert second.returncode == 2 and second.stderr.count("\n") == 1
    assert f"in use by process {first.pid}" in second.stderr
    first.send_signal(signal.SIGKILL)
    first.communicate()
    resume(sandbox, "locked")


@pytest.mark.slow
def test_run_that_hangs_in_an_update_exits_at_the_second_signal_and_can_be_resumed(sandbox: Sandbox) -> None:
    hanging = sandbox.start(f"--config={sandbox.folder / 'toy.py'}", workdir="hung", HANG_AT="7")
    wait_for(hanging, "hangs")
    hanging.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert hanging.poll() is None
    hanging.send_signal(signal.SIGTERM)
    _, err = hanging.communicate(timeout=30)
    assert hanging.returncode == STOPPED and "at the second signal" in err
    resume(sandbox, "hung")


@pytest.mark.slow
def test_full_disk_exits_with_74_and_one_line_and_keeps_the_last_checkpoint(sandbox: Sandbox) -> None:
    kill(sandbox, "full", 10, signal.SIGKILL, -signal.SIGKILL)
    config, before = f"--config={sandbox.folder / 'toy.py'}", updates_saved(sandbox.folder / "full")
    full = sandbox.start(config, workdir="full", limit_file_kib=16)
    _, err = full.communicate(timeout=300)
    assert full.returncode == 74 and err.count("\n") == 1, err
    assert "File too large" in err and "full/checkpoints" in err and "fix the disk" in err
    assert updates_saved(sandbox.folder / "full") == before
    resume(sandbox, "full")


@pytest.mark.slow
def test_run_resumes_on_other_devices_and_back_with_the_same_losses(sandbox: Sandbox) -> None:
    config, four = f"--config={sandbox.folder / 'toy.py'}", "--xla_force_host_platform_device_count=4"
    args = ("--config.mesh.data=2", "--config.mesh.fsdp=2", f"--workdir={sandbox.folder / 'moved_mesh'}")
    kill(sandbox, "moved_mesh", 7, signal.SIGKILL, -signal.SIGKILL)
    moved = sandbox.train(config, *args, workdir="moved_mesh", XLA_FLAGS=four, KILL_AT="14 9")
    assert moved.returncode == -signal.SIGKILL and "resumed after update" in moved.stdout, moved.stderr
    back = sandbox.train(config, workdir="moved_mesh")
    assert back.returncode == DONE, back.stderr
    for row, whole in zip(sandbox.rows("moved_mesh"), sandbox.rows("whole"), strict=True):
        assert row.keys() == whole.keys() and row["update"] == whole["update"]
        if "loss" in row:
            assert row["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.slow
def test_damaged_checkpoint_costs_a_warning_and_some_updates(sandbox: Sandbox) -> None:
    kill(sandbox, "damaged", 17, signal.SIGKILL, -signal.SIGKILL)
    *_, before, newest = updates_saved(sandbox.folder / "damaged")
    for file in (sandbox.folder / "damaged" / "checkpoints" / str(newest)).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-7])
    finished = sandbox.train(f"--config={sandbox.folder / 'toy.py'}", workdir="damaged")
    assert finished.returncode == DONE and f"resumed after update {before}" in finished.stdout
    assert finished.stderr.startswith("warning: ") and finished.stderr.count("\n") == 1, finished.stderr
    assert sandbox.rows("damaged") == sandbox.rows("whole")


def test_workdir_is_used_by_one_process_at_a_time(tmp_path: pathlib.Path) -> None:
    code = "import pathlib, sys; from relora_jax.run.directory import locked\n"
    code += "from relora_jax.storage.writer import Writer\n"
    code += "from tests.support.small import config\n"
    code += "with locked(Writer(pathlib.Path(sys.argv[1])), config()): print(9)"

    def other() -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-c", code, str(tmp_path / "run")]
        return subprocess.run(args, capture_output=True, text=True)

    with directory.locked(Writer(tmp_path / "run"), small.config()):
        refused = other()
        assert refused.stdout == "" and f"in use by process {os.getpid()}: wait" in refused.stderr
    assert other().stdout == "9\n"
    with directory.locked(Writer(tmp_path / "run"), small.config()):
        pass  # a run may start in a directory with only a lock


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    """Waits until the process prints a line with the word."""
    assert process.stdout is not None
    for line in process.stdout:
        if word in line:
            return
    raise AssertionError(process.communicate()[1])
