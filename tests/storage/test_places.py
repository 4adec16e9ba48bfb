import threading
import time
from pathlib import Path

import pytest

from relora_jax.data import sotu
from relora_jax.storage import atomic, places


def test_places_are_read_from_the_environment_at_each_call(monkeypatch, tmp_path):
    for variable, folder in (("XDG_CACHE_HOME", places.cache_dir), ("TFDS_DATA_DIR", places.datasets_dir)):
        monkeypatch.setenv(variable, str(tmp_path / variable))
        assert folder().is_relative_to(tmp_path / variable) and not folder().exists()
        monkeypatch.delenv(variable)
    assert places.cache_dir() == Path.home() / ".cache/relora_jax"
    assert places.datasets_dir() == Path.home() / "tensorflow_datasets"


def test_of_two_makers_one_makes_and_the_other_waits(tmp_path):
    made = []

    def make(aside):
        made.append(aside)
        aside.mkdir()
        time.sleep(0.05)
        (aside / "whole").touch()

    def find():
        assert (atomic.make_once(tmp_path / "thing", make, variable="X") / "whole").exists()
        made.append("found")

    threads = [threading.Thread(target=find) for _ in range(3)]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            step(thread)
    assert made == [tmp_path / "thing.partial", "found", "found", "found"]


def test_failed_making_leaves_nothing_under_the_name_and_can_be_tried_again(tmp_path):
    def fail(aside):
        aside.write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        atomic.make_once(tmp_path / "thing", fail, variable="X")
    assert not (tmp_path / "thing").exists()
    whole = atomic.make_once(tmp_path / "thing", lambda aside: aside.write_text("whole"), variable="X")
    assert whole.read_text() == "whole"
    assert atomic.make_once(whole, fail, variable="X").read_text() == "whole"


def test_directory_that_cannot_be_written_is_named_with_its_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot write .*file/sotu/1\.0\.0 .*: set TFDS_DATA_DIR"):
        sotu.build()
