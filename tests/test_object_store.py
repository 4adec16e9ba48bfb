"""A run at gs:// is killed, stopped and resumed like a local one, and no command needs more than its URL."""

import json
import pathlib
import shutil
import time

import numpy as np
import pytest

from relora_jax.checkpoint.saved import updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.run import metrics_file
from relora_jax.storage.location import AnyPath, any_path, file_system
from tests.support.commands import Sandbox
from tests.support.emulator import Emulator

pytestmark = pytest.mark.slow
OUTAGE_S = 60


@pytest.fixture(scope="module")
def sandbox(emulator: Emulator, tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    return Sandbox(tmp_path_factory.mktemp("run"))


def outcome(workdir: AnyPath) -> tuple[list[dict[str, object]], dict[str, np.ndarray]]:
    """The rows without their times, and the model of the last checkpoint."""
    rows = [
        {k: v for k, v in row.items() if k not in metrics_file.TIMES} for row in metrics_file.read(workdir)
    ]
    return rows, dict(variables_of(workdir, updates_saved(workdir)[-1]))


def test_killed_and_stopped_run_ends_as_a_local_one(sandbox: Sandbox) -> None:
    config, url = f"--config={sandbox.folder}/toy.py", "gs://bucket/killed"
    local = sandbox.train(config, workdir="local")
    assert local.returncode == 0, local.stderr
    killed = sandbox.train(config, workdir=url, KILL_AT="11 9")
    assert killed.returncode == -9
    assert (any_path(url) / "lock").exists()
    stopped = sandbox.train(config, workdir=url, KILL_AT="14 15")
    assert stopped.returncode == 75, stopped.stderr
    # another machine, with an empty cache: it copies the rows
    shutil.rmtree(sandbox.folder / "cache" / "relora_jax" / "rows")
    ended = sandbox.train(config, "--config.train.profile=16:17", workdir=url)
    assert ended.returncode == 0, ended.stderr
    assert "resumed after update 15" in ended.stdout
    assert list((any_path(url) / "profile").glob("plugins/profile/*/*.xplane.pb"))
    assert f"copying rows from {url}/rows" in ended.stderr

    rows, weights = outcome(sandbox.folder / "local")
    other_rows, other_weights = outcome(any_path(url))
    assert other_rows == rows
    assert all(np.array_equal(weights[path], other_weights[path]) for path in weights)
    report = (any_path(url) / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4
    assert not (any_path(url) / "lock").exists()

    evaluated = sandbox.evaluate("--json", workdir=url)
    assert json.loads(evaluated.stdout)["workdir"] == url
    for command in ("generate", "report", f"export --output={sandbox.folder}/exported"):
        process = sandbox.start(*command.split()[1:], workdir=url, command=command.split()[0])
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        assert url in out
    assert (sandbox.folder / "exported" / "config.json").exists()


def test_damaged_checkpoint_is_moved_and_the_one_before_is_taken(sandbox: Sandbox) -> None:
    config, url = f"--config={sandbox.folder}/toy.py", "gs://bucket/damaged"
    assert sandbox.train(config, workdir=url, KILL_AT="14 15").returncode == 75
    assert updates_saved(any_path(url))[-1] == 15
    store = file_system(any_path(url))
    for name in store.find(f"{url}/checkpoints/15/state"):
        if "/d/" in name:
            store.pipe_file(name, store.cat_file(name)[:-20])
    ended = sandbox.train(config, workdir=url)
    assert ended.returncode == 0, ended.stderr
    assert f"moved to {url}/damaged/15, restoring an earlier checkpoint" in ended.stderr
    assert (any_path(url) / "damaged" / "15" / "commit_success.txt").exists()


def test_run_goes_on_after_a_minute_without_the_store(sandbox: Sandbox, emulator: Emulator) -> None:
    args = ["--config.train.updates=300", "--config.train.save_every_updates=10"]
    process = sandbox.start(f"--config={sandbox.folder}/toy.py", *args, workdir="gs://bucket/outage")
    folder = pathlib.Path(emulator.folder, ".cloudstorage", "bucket", "outage", "checkpoints", "20")
    while not folder.exists() and process.poll() is None:
        time.sleep(0.1)
    emulator.stop()
    time.sleep(OUTAGE_S)
    assert process.poll() is None and not (folder.parent / "300").exists()
    emulator.start()
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert "report gs://bucket/outage/report.md" in out


def test_second_process_is_refused(sandbox: Sandbox) -> None:
    config, url = f"--config={sandbox.folder}/toy.py", "gs://bucket/two"
    first = sandbox.start(config, "--config.train.updates=100000", workdir=url)
    try:
        while not (any_path(url) / "lock").exists() and first.poll() is None:
            time.sleep(0.1)
        second = sandbox.train(config, "--config.train.updates=100000", workdir=url)
        assert second.returncode == 2
        assert f"{url} is in use by process {first.pid} on " in second.stderr
    finally:
        first.terminate()
        first.communicate()
    assert first.returncode == 75
