import threading
import time
from pathlib import Path

import pytest

from relora_jax.data import sotu
from relora_jax.storage import atomic, places


def test_directories_are_read_from_the_environment_at_each_call(monkeypatch, tmp_path):
    for variable, folder in (("XDG_CACHE_HOME", places.cache_dir), ("TFDS_DATA_DIR", places.datasets_dir)):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert folder().is_relative_to(tmp_path / variable) and not folder().exists()
        monkeypatch.delenv(variable)
    assert places.cache_dir() == Path.home() / ".cache/relora_jax"
    assert places.datasets_dir() == Path.home() / "tensorflow_datasets"


def test_one_process_makes_it_while_the_others_wait(tmp_path):
    events = []

    def make(partial):
        events.append(partial)
        partial.mkdir()
        time.sleep(0.05)
        (partial / "whole").touch()

    def call():
        assert (atomic.make_once(tmp_path / "thing", make, variable="X") / "whole").exists()
        events.append("returned")

    threads = [threading.Thread(target=call) for _ in range(3)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert events == [tmp_path / "thing.partial", "returned", "returned", "returned"]


def test_failed_make_leaves_no_file_and_can_be_retried(tmp_path):
    def fail(partial):
        partial.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        atomic.make_once(tmp_path / "thing", fail, variable="X")
    assert not (tmp_path / "thing").exists()
    whole = atomic.make_once(tmp_path / "thing", lambda partial: partial.write_text("whole"), variable="X")
    assert whole.read_text() == "whole"
    assert atomic.make_once(whole, fail, variable="X").read_text() == "whole"


def test_unwritable_directory_is_named_with_its_environment_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write .*file/sotu/1\.0\.0 .*: set TFDS_DATA_DIR"):
        sotu.build()
