import os
import resource

import numpy as np
import pytest

from relora_jax.data import rows
from relora_jax.data.rows import RowStore, RowWriter, record_type
from tests.support.documents import write_store

LENGTH, VOCAB_SIZE = 6, 50


@pytest.fixture
def store(tmp_path):
    """Three shards of 600, 10 and 300 rows; row k starts with k % VOCAB_SIZE."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (910, LENGTH + 1))
    ids[:, 0] = np.arange(910) % VOCAB_SIZE
    lengths = np.random.default_rng(1).integers(0, LENGTH + 2, 910)
    return write_store(tmp_path / "s", [ids[:600], ids[600:610], ids[610:]], lengths, vocab_size=VOCAB_SIZE)


def test_rows_are_read_in_the_requested_order(store):
    indices = [36, 0, 620, 620, 5, 909, 605, 19]
    ids, lengths = store.read(indices)
    assert ids[:, 0].tolist() == [k % VOCAB_SIZE for k in indices] and ids.dtype == lengths.dtype == np.int32
    every, every_length = store.read(range(910))
    assert (every[indices] == ids).all() and (every_length[indices] == lengths).all()
    assert store.counts.tolist() == np.bincount(every.ravel(), minlength=VOCAB_SIZE).tolist()
    assert store.read([])[0].shape == (0, LENGTH + 1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("00001.array_record", lambda content: content[:-70_000]),
        ("00001.array_record", None),
        ("counts.npy", None),
        ("manifest.json", None),
        ("manifest.json", lambda content: b""),
        ("manifest.json", lambda content: content.replace(b'"format": 4', b'"format": 1')),
        ("manifest.json", lambda content: content.replace(b'"rows": 910', b'"rows": 909')),
    ],
)
def test_incomplete_store_is_rejected_by_name(store, file, damage):
    damaged = store.path / file
    content = damaged.read_bytes()
    damaged.unlink() if damage is None else damaged.write_bytes(damage(content))
    with pytest.raises(OSError, match=f"^{store.path} is not a complete row store .*: delete it"):
        RowStore.open(store.path)


def remove(file):
    file.unlink()


def overwrite(file):
    with file.open("r+b") as opened:
        opened.seek(5_000)
        opened.write(b"\xff" * 50)


def empty(file):
    os.truncate(file, 0)


def shorten(file):
    with RowWriter(file, sequence_length=LENGTH, vocab_size=VOCAB_SIZE) as writer:
        writer.write(np.zeros((2, LENGTH + 1), np.int32), np.full(2, LENGTH + 1, np.int32))


def widen(file):
    with RowWriter(file, sequence_length=LENGTH + 1, vocab_size=VOCAB_SIZE) as writer:
        writer.write(np.zeros((300, LENGTH + 2), np.int32), np.full(300, LENGTH, np.int32))


@pytest.mark.parametrize("damage", [remove, overwrite, empty, shorten, widen])
def test_shard_damaged_during_a_run_is_an_os_error_that_names_it(store, damage):
    file = store.path / "00002.array_record"
    damage(file)
    with pytest.raises(OSError, match=f"rows in {file} cannot be read .*start again") as raised:
        store.read([3, 605, *range(610, 910)])
    assert "\n" not in str(raised.value)
    assert len(store.read([3, 605])[0]) == 2  # the other shards stay readable


def test_soft_limit_of_open_files_rises_with_the_shards_up_to_the_hard_limit(store, monkeypatch):
    limits = {"now": (600, 4000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(now=pair))
    RowStore.open(store.path)
    assert limits["now"] == (600, 4000)  # enough for three shards
    monkeypatch.setattr(rows, "SPARE_FILES", 1000)
    RowStore.open(store.path)
    assert limits["now"] == (1006, 4000)
    limits["now"] = (100, 800)
    with pytest.raises(ValueError, match=r"3 shards, but a process may have only 800 files open: .* to 1003"):
        RowStore.open(store.path)


def test_shard_is_published_only_when_complete(tmp_path):
    file = tmp_path / "a"
    ids, lengths = np.full((3, 7), 4, np.int32), np.array([7, 2, 1], np.int32)
    with pytest.raises(KeyError), RowWriter(file, sequence_length=6, vocab_size=9) as writer:
        writer.write(ids, lengths)
        raise KeyError
    assert not file.exists()
    with RowWriter(file, sequence_length=6, vocab_size=9) as writer:
        writer.write(ids[:1], lengths[:1])
        writer.write(ids[:0], lengths[:0])
        writer.write(ids[1:], lengths[1:])
        assert not file.exists()
    assert file.exists() and writer.rows == 3 and writer.counts.tolist() == [0, 0, 0, 0, 10, 0, 0, 0, 0]
    with RowWriter(tmp_path / "none", sequence_length=6, vocab_size=9):
        pass
    assert not (tmp_path / "none").exists()


def test_failure_to_write_rows_is_an_os_error(tmp_path):
    writer = RowWriter(tmp_path / "nowhere" / "a", sequence_length=6, vocab_size=9)
    with pytest.raises(OSError, match="nowhere/a cannot be written"), writer:
        writer.write(np.zeros((3, 7), np.int32), np.full(3, 7, np.int32))


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_record_holds_the_largest_id(tmp_path, vocab_size, width):
    record = record_type(sequence_length=30, vocab_size=vocab_size)
    assert record.itemsize == 4 + 31 * width and record["ids"].base == np.dtype(f"<u{width}")
    with RowWriter(tmp_path / "a", sequence_length=30, vocab_size=vocab_size) as writer:
        writer.write(np.full((2, 31), vocab_size - 1, np.int32), np.full(2, 31, np.int32))
    assert writer.counts[vocab_size - 1] == 62
