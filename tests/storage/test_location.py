"""Local paths stay what they were; a run at gs:// reads and writes whole objects."""

import json
import pathlib
from typing import Any

import pytest

from relora_jax.checkpoint.saved import DamagedError, checkpoints_dir, os_error_code, updates_saved
from relora_jax.errors import UserError
from relora_jax.run import directory
from relora_jax.storage import atomic, lease, location, places
from relora_jax.storage.location import AnyPath, any_path, entries, is_remote
from relora_jax.storage.lock import locked
from relora_jax.storage.writer import Writer
from tests.support import small
from tests.support.emulator import Emulator


@pytest.fixture
def folder(emulator: Emulator, request: pytest.FixtureRequest) -> AnyPath:
    """An empty directory in the store."""
    return any_path(f"gs://bucket/{request.node.name}/run")


def refuse(process: str) -> None:
    raise UserError(process)


def test_local_path_is_a_path_with_its_home() -> None:
    assert any_path("~/run") == pathlib.Path.home() / "run" and not is_remote(any_path("run"))


@pytest.mark.parametrize("url", ["s3://bucket/run", "gs://", "https://example.org/run", "file:///run"])
def test_other_url_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="is not a directory for runs: use a local path, or gs://bucket/run"):
        any_path(url)


@pytest.mark.parametrize(
    ("variable", "directory"), [("XDG_CACHE_HOME", "cache_dir"), ("TFDS_DATA_DIR", "datasets_dir")]
)
def test_cache_and_datasets_are_local(variable: str, directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "gs://bucket/cache")
    with pytest.raises(UserError, match=f"{variable}=gs://bucket/cache is a URL"):
        getattr(places, directory)()


def test_missing_gcsfs_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> Any:
        raise ImportError("install gcsfs")

    monkeypatch.setattr(location, "_configure", lambda: None)
    monkeypatch.setattr(location.epath, "Path", missing)
    with pytest.raises(UserError, match=r"needs gcsfs .*pip install 'relora-jax\[gcs\]'"):
        any_path("gs://bucket/run")


def test_objects_are_written_listed_renamed_and_appended_to(folder: AnyPath) -> None:
    assert entries(folder) == []
    writer = Writer(folder)
    writer.write("config.json", "{}")
    lines = writer.append("metrics.jsonl")
    lines.add("one")
    lines.sync()
    lines.add("two")
    assert (folder / "metrics.jsonl").read_text() == "one\n"
    lines.close()
    again = writer.append("metrics.jsonl")
    again.add("three")
    again.close()
    assert (folder / "metrics.jsonl").read_text() == "one\ntwo\nthree\n"
    assert {path.name for path in entries(folder)} == {"config.json", "metrics.jsonl"}

    atomic.write(folder / "checkpoints" / "3" / "meta", b"3")
    assert len(entries(folder)) == 3  # a cached listing would lack what another file system wrote
    writer.rename(folder / "checkpoints" / "3", folder / "damaged" / "3")
    assert (folder / "damaged" / "3" / "meta").read_bytes() == b"3"
    assert not (folder / "checkpoints" / "3").exists()


def test_missing_bucket_is_named_before_anything_is_computed(emulator: Emulator) -> None:
    writer = Writer(any_path("gs://missing/run"))
    with (
        pytest.raises(UserError, match=r"'gs://missing/run' cannot be written \(no such bucket\)"),
        directory.locked(writer, small.config()),
    ):
        pass


def test_save_without_orbax_commit_is_not_a_checkpoint(folder: AnyPath) -> None:
    for name in ("checkpoints/3/commit_success.txt", "checkpoints/3/meta", "checkpoints/6/meta"):
        atomic.write(folder / name, b"")
    assert updates_saved(folder) == [3]


def test_parent_and_patterns_in_a_url_are_refused() -> None:
    for name in ("run[1]", "a/../run", "a?b"):
        with pytest.raises(UserError, match="cannot hold checkpoints"):
            checkpoints_dir(location.epath.Path(f"gs://bucket/{name}"))


def test_marker_excludes_others_and_is_removed(
    folder: AnyPath, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lease, "REFRESH_S", 0.05)
    monkeypatch.setattr(lease, "POLL_S", 0.1)
    with locked(folder / "lock", busy=refuse):
        monkeypatch.setattr(lease, "_machine", lambda: "another 1")
        with pytest.raises(UserError, match=r"^\d+ on "), locked(folder / "lock", busy=refuse):
            pass
    assert "waiting up to 120 s to see if it still runs" in capsys.readouterr().err
    assert entries(folder) == []


def test_marker_that_nobody_refreshes_is_replaced(folder: AnyPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "POLL_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 0.2)
    killed = {"process": 1, "machine": "another 1", "id": "x", "refreshed": 7}
    atomic.write(folder / "lock", json.dumps(killed).encode())
    with locked(folder / "lock", busy=refuse):
        assert json.loads((folder / "lock").read_bytes())["id"] != "x"


def test_marker_of_a_process_that_is_gone_is_replaced_at_once(folder: AnyPath) -> None:
    killed = {"process": 2**22 + 1, "machine": lease._machine(), "id": "x", "refreshed": 7}  # above any pid
    atomic.write(folder / "lock", json.dumps(killed).encode())
    with locked(folder / "lock", busy=refuse):
        pass


def test_two_that_start_together_do_not_both_hold_it(
    folder: AnyPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(folder / "lock", busy=refuse):
        answers = iter([None])  # it read that the marker is free before the other one wrote it
        read = lease._read
        monkeypatch.setattr(lease, "_read", lambda file: next(answers, read(file)))
        with pytest.raises(UserError, match=r"\d+ on "), locked(folder / "lock", busy=refuse):
            pass


def test_failing_store_is_not_a_damaged_checkpoint(emulator: Emulator) -> None:
    from gcsfs.retry import HttpError

    from relora_jax.checkpoint import saved

    path = any_path("gs://bucket/run")
    for error in (
        HttpError({"code": 503, "message": "later"}),
        ValueError("ABORTED: All 32 retry attempts failed: Service Unavailable [http_response_code='503']"),
        ValueError("PERMISSION_DENIED: Forbidden [http_response_code='403']"),
        OSError("Forbidden: bucket"),
        TimeoutError(),
    ):
        assert not isinstance(saved._damaged(path, error), DamagedError)
    for error in (
        FileNotFoundError("b/run"),
        ValueError("NOT_FOUND: x"),
        KeyError("x"),
    ):
        assert isinstance(saved._damaged(path, error), DamagedError)
    assert os_error_code(ValueError("x")) == 0


def test_network_may_be_down_for_a_minute(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """gcsfs's pauses, which are not waited for here, add up to more than a minute."""
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if sum(pauses) > 60 >= sum(pauses[:-1]):
            emulator.start()

    path = any_path("gs://bucket/outage/run")
    atomic.write(path / "config.json", b"{}")
    emulator.stop()
    monkeypatch.setattr("gcsfs.retry.asyncio.sleep", sleep)
    assert (path / "config.json").read_bytes() == b"{}" and sum(pauses) > 60
