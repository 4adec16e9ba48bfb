"""Directories are replaced in one step, and foreign files are never overwritten."""

import concurrent.futures
import contextlib
import errno
import itertools
import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest

from relora_jax.storage import atomic

OURS = ("config.json", "model*.safetensors")


def make(path: Path, *, overwrite: bool = False, name: str = "config.json") -> None:
    with atomic.directory(path, OURS, overwrite=overwrite) as partial:
        (partial / name).write_text("new")


def tree(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != atomic.MARK]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def test_directory_is_complete_or_absent(tmp_path: Path) -> None:
    make(tmp_path / "deep" / "new")
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    with (
        pytest.raises(OSError, match="full"),
        atomic.directory(tmp_path / "half", OURS, overwrite=False) as partial,
    ):
        (partial / "config.json").write_text("half")
        raise OSError("full")
    assert tree(tmp_path) == {"deep/new/config.json": "new", "empty/config.json": "new"}
    assert not list(tmp_path.glob(".*"))


def test_write_works_on_file_systems_that_cannot_sync_directories(tmp_path: Path, monkeypatch: Any) -> None:
    code = [errno.EINVAL]

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) or code != [errno.EINVAL]:
            raise OSError(code[0], "no")

    monkeypatch.setattr(os, "fsync", fsync)
    atomic.write(tmp_path / "file", b"whole")
    assert (tmp_path / "file").read_bytes() == b"whole"
    code[0] = errno.EIO
    with pytest.raises(OSError, match="no"):
        atomic.write(tmp_path / "other", b"lost")
    assert not (tmp_path / "other").exists()


def test_partial_directory_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".new.partial").mkdir()
    (tmp_path / ".new.partial" / "half").touch()
    make(tmp_path / "new")
    assert tree(tmp_path) == {"new/config.json": "new"}


def test_existing_output_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    make(tmp_path / "out", name="model-00001-of-00002.safetensors")
    with pytest.raises(ValueError, match="not empty: choose another path, or replace it with --overwrite"):
        make(tmp_path / "out")
    assert tree(tmp_path) == {"out/model-00001-of-00002.safetensors": "new"}
    make(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out/config.json": "new"} and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_files_are_never_overwritten(tmp_path: Path, overwrite: bool) -> None:
    make(tmp_path / "out")
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("of a model that somebody else wrote")
    bad = {
        "out": "thesis.tex",
        "file": "not a directory",
        "link": "a symbolic link",
        "file/below": "file is not a directory",
    }
    for name, message in (bad | {"theirs": "was not written by this command"}).items():
        with pytest.raises(ValueError, match=message):
            make(tmp_path / name, overwrite=overwrite)
    with (
        pytest.raises(ValueError, match="late"),
        atomic.directory(tmp_path / "a", OURS, overwrite=overwrite),
    ):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "late").touch()
    assert (tmp_path / "a" / "late").exists()
    assert tree(tmp_path / "out") == {"config.json": "new", "thesis.tex": "years of work"}


def test_second_writer_of_a_directory_is_refused(tmp_path: Path) -> None:
    with atomic.directory(tmp_path / "new", OURS, overwrite=False) as partial:
        with pytest.raises(ValueError, match="being written by another process"):
            make(tmp_path / "new")
        (partial / "config.json").write_text("first")
    assert tree(tmp_path) == {"new/config.json": "first"}


@pytest.mark.parametrize("fails", [False, True])
def test_kill_between_the_two_renames_loses_nothing(tmp_path: Path, fails: bool) -> None:
    make(tmp_path / "out", name="model.safetensors")
    (tmp_path / "out").rename(tmp_path / ".out.replaced")  # killed here
    if fails:
        with (
            pytest.raises(OSError, match="full"),
            atomic.directory(tmp_path / "out", OURS, overwrite=True) as partial,
        ):
            (partial / "config.json").touch()
            raise OSError("full")
    else:
        make(tmp_path / "out", overwrite=True)
    assert tree(tmp_path) == {"out/model.safetensors" if fails else "out/config.json": "new"}
    assert not list(tmp_path.glob(".*"))


def test_error_is_raised_even_if_threads_still_write_to_the_directory(tmp_path: Path) -> None:
    def keep_writing(folder: Path, end: float) -> None:
        with contextlib.suppress(OSError):  # the folder was removed
            for k in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
                (folder / str(k)).touch()
                (folder / str(k - 1)).unlink(missing_ok=True)

    with (
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        pytest.raises(OSError, match="the first error"),
        atomic.directory(tmp_path / "new", OURS, overwrite=False) as partial,
    ):
        (partial / "deep").mkdir()
        pool.submit(keep_writing, partial / "deep", time.monotonic() + 0.2)
        raise OSError("the first error")
    assert not list(tmp_path.iterdir())
