import itertools
import threading
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relora_jax.data import batches as data
from relora_jax.training.evaluation import unigram_perplexity
from tests.support.documents import write_store

ROWS, LENGTH, VOCAB_SIZE = 37, 6, 50


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Three shards of rows of different lengths; row k starts with k."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB_SIZE, (ROWS, LENGTH + 1))
    ids[:, 0] = np.arange(ROWS)
    lengths = rng.integers(0, LENGTH + 2, ROWS)
    return write_store(
        tmp_path_factory.mktemp("d") / "s", [ids[:20], ids[20:21], ids[21:]], lengths, vocab_size=VOCAB_SIZE
    )


def sharding(devices: int = 1, *axes):
    return NamedSharding(Mesh(np.array(jax.devices()[:devices]), ("data",)), PartitionSpec(*axes))


def train_batch(store, update, *, batch=12, microbatch=4, seed=3, devices=1, apart=False):
    shape = {"batch": batch, "microbatch": microbatch, "sharding": sharding(devices, None, "data")}
    return data.train_batch(store, update, seed=seed, across_documents=not apart, **shape)


def validation_batches(store, *, eval_tokens=10**9, microbatch=4, devices=1, apart=False):
    shape = {"microbatch": microbatch, "sharding": sharding(devices, "data")}
    return data.validation_batches(store, eval_tokens=eval_tokens, across_documents=not apart, **shape)


@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 300), seed=st.integers(0, 2**70), epoch=st.integers(0, 10**7))
def test_each_epoch_of_the_stream_is_every_row_once(rows, seed, epoch):
    indices = [data.row_index(epoch * rows + k, rows=rows, seed=seed) for k in range(rows)]
    assert sorted(indices) == list(range(rows))


def test_each_epoch_and_seed_has_its_own_order():
    orders = {
        tuple(data.row_index(epoch * 50 + k, rows=50, seed=seed) for k in range(50))
        for seed, epoch in itertools.product(range(4), range(4))
    }
    assert len(orders) == 16 and tuple(range(50)) not in orders


def test_order_is_the_same_on_every_machine():
    golden = [
        data.row_index(i, rows=21_375, seed=s) for s in (0, 1, 2**40) for i in (0, 1, 21_374, 21_375, 10**12)
    ]
    assert golden == [
        18062,
        17787,
        5168,
        14783,
        4549,
        12653,
        3656,
        9701,
        11575,
        10687,
        902,
        5570,
        975,
        10785,
        8063,
    ]


def test_row_j_of_update_u_is_row_uB_plus_j_of_the_stream(store):  # noqa: N802
    for update in (0, 1, 7, 10**9):  # 37 rows and 12 per update: epochs start inside updates
        ids, lengths = store.read([data.row_index(update * 12 + j, rows=ROWS, seed=3) for j in range(12)])
        batch = train_batch(store, update)
        assert np.asarray(batch.ids).tolist() == ids.reshape(3, 4, -1).tolist()
        assert np.asarray(batch.lengths).tolist() == lengths.reshape(3, 4).tolist()


def test_batch_larger_than_the_store_continues_into_the_next_epoch(store):
    first = np.asarray(train_batch(store, 0, batch=80, microbatch=8).ids).reshape(80, -1)[:, 0]
    assert sorted(first[:ROWS]) == sorted(first[ROWS : 2 * ROWS]) == list(range(ROWS))


@pytest.mark.parametrize(("microbatch", "devices"), [(2, 1), (12, 1), (4, 4), (12, 4), (6, 2)])
def test_rows_of_an_update_do_not_depend_on_microbatch_or_devices(store, microbatch, devices):
    alone = train_batch(store, 5, apart=True)
    batch = train_batch(store, 5, microbatch=microbatch, devices=devices, apart=True)
    for one, other in zip(alone, batch, strict=True):
        assert (np.asarray(one).reshape(12, -1) == np.asarray(other).reshape(12, -1)).all()
        assert other.sharding.is_equivalent_to(sharding(devices, None, "data"), other.ndim)


@pytest.mark.parametrize("spec", [(None, "data", None), (None, ("data",)), (None, None), ()])
def test_lengths_are_laid_out_as_ids_are(store, spec):
    rows = sharding(2, *spec)
    shape = {"batch": 8, "microbatch": 4, "sharding": rows}
    batch = data.train_batch(store, 1, seed=3, across_documents=True, **shape)
    for ids, lengths in zip(batch.ids.addressable_shards, batch.lengths.addressable_shards, strict=True):
        assert ids.device == lengths.device and ids.index[:2] == lengths.index


def test_process_reads_only_its_own_rows_and_only_once(store, monkeypatch):
    theirs = jax.devices()[2:4]
    everyone = NamedSharding.addressable_devices_indices_map

    def mine(self, shape):  # of 4 devices, the last 2 belong to another process
        return {device: index for device, index in everyone(self, shape).items() if device not in theirs}

    everything = (slice(None),) * 3
    requests = []
    monkeypatch.setattr(jax, "make_array_from_callback", lambda shape, s, f: f(everything[: len(shape)]))
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", mine)
    source = type(store._source)
    read = source.__getitems__
    monkeypatch.setattr(
        source, "__getitems__", lambda self, keys: requests.append(list(keys)) or read(self, keys)
    )
    batch = train_batch(store, 2, devices=4)
    indices = np.array([data.row_index(24 + j, rows=ROWS, seed=3) for j in range(12)]).reshape(3, 4)
    assert requests == [indices[:, :2].ravel().tolist()]
    assert np.asarray(batch.ids)[:, :2, 0].tolist() == indices[:, :2].tolist()


def test_validation_is_the_first_rows_of_the_store_with_the_last_batch_padded(store):
    ids, lengths = store.read(range(ROWS))
    for eval_tokens, rows in ((0, 1), (LENGTH, 1), (10 * LENGTH + 5, 10), (8 * LENGTH, 8), (10**9, ROWS)):
        batches = list(validation_batches(store, eval_tokens=eval_tokens, devices=2))
        assert data.validation_rows(store, eval_tokens=eval_tokens) == rows
        assert len(batches) == -(-rows // 4)
        assert all(b.ids.shape == (4, LENGTH + 1) and b.lengths.shape == (4,) for b in batches)
        batch_ids, batch_lengths = (
            np.concatenate([np.asarray(batch[part]) for batch in batches]) for part in range(2)
        )
        assert (batch_ids[:rows] == ids[:rows]).all() and (batch_lengths[:rows] == lengths[:rows]).all()
        assert (batch_lengths[rows:] == 0).all()


def test_unigram_perplexity_is_that_of_the_smoothed_counts_over_counted_targets(store):
    counts = np.random.default_rng(1).integers(0, 9, VOCAB_SIZE)
    batches = list(validation_batches(store, microbatch=8))
    ids, lengths = store.read(range(ROWS))
    targets = [t for row, length in zip(ids, lengths, strict=True) for t in row[1 : max(length, 1)]]
    probability = (counts + 1) / (counts + 1).sum()
    expected = np.exp(-np.mean([np.log(probability[t]) for t in targets]))
    assert unigram_perplexity(counts, batches) == pytest.approx(expected, rel=1e-12)
    assert unigram_perplexity(np.full(VOCAB_SIZE, 4), batches) == pytest.approx(VOCAB_SIZE, rel=1e-12)
    train = [train_batch(store, 0, batch=ROWS, microbatch=ROWS)]  # an update's batch counts the same
    assert unigram_perplexity(counts, train) == pytest.approx(expected, rel=1e-12)


def documents_of(row, eos):
    """The documents in a row, each with its EOS; the last may lack it."""
    starts = [0, *(index + 1 for index, piece in enumerate(row) if piece == eos)]
    return [row[a:b] for a, b in itertools.zip_longest(starts, starts[1:]) if len(row[a:b])]


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.lists(st.integers(0, 2), min_size=7, max_size=7), min_size=1, max_size=4))
def test_an_eos_belongs_to_the_document_that_it_ends(rows):
    numbers = data.number_documents(np.array(rows, np.int32), 2)
    assert numbers.dtype == np.int32
    for row, segments in zip(rows, numbers.tolist(), strict=True):
        assert segments == [n for n, document in enumerate(documents_of(row, 2)) for _ in document]


def test_segment_ids_number_documents_unless_attention_crosses_documents(store):
    for batch in (train_batch(store, 2, devices=2, apart=True), *validation_batches(store, apart=True)):
        numbers = data.number_documents(np.asarray(batch.ids), store.eos)
        assert np.asarray(batch.segment_ids).tolist() == numbers.tolist()
        assert batch.segment_ids.sharding == batch.ids.sharding
    for batch in (train_batch(store, 2), *validation_batches(store)):
        assert batch.segment_ids is None and len(jax.tree.leaves(batch)) == 2


def test_unigram_perplexity_skips_targets_after_eos_without_attention_across_documents(tmp_path):
    ids, lengths = np.random.default_rng(5).integers(0, 4, (9, LENGTH + 1)), np.arange(9) % (LENGTH + 2)
    store = write_store(tmp_path / "s", [ids], lengths, vocab_size=4, eos=3)
    parts = [
        d for row, n in zip(ids.tolist(), lengths, strict=True) for d in documents_of(row[:n], store.eos)
    ]
    targets = [piece for document in parts for piece in document[1:]]
    probability = np.array([2, 3, 4, 9]) / 18
    expected = np.exp(-np.mean([np.log(probability[t]) for t in targets]))
    batches = validation_batches(store, apart=True)
    assert unigram_perplexity(np.array([1, 2, 3, 8]), batches) == pytest.approx(expected, rel=1e-12)


def test_prefetch_yields_batches_in_order_and_loads_only_a_few_ahead():
    loaded = []

    def load(u):
        loaded.append(u)
        return u

    for u, batch in enumerate(data.prefetch(load, 3, 20, depth=2), 3):  # pyright: ignore
        assert u == batch
        time.sleep(0.002)
        assert len(loaded) <= u - 3 + 1 + 2
    assert loaded == list(range(3, 20))
    assert list(data.prefetch(load, 5, 5)) == []  # pyright: ignore


def test_prefetch_loads_while_the_consumer_works():
    loaded = threading.Event()

    def load(u):
        if u == 1:
            loaded.set()
        return u

    batches = data.prefetch(load, 0, 9)  # pyright: ignore
    assert next(batches) == 0
    assert loaded.wait(5)
    batches.close()


def test_error_is_raised_in_place_of_its_batch():
    def load(u):
        if u == 3:
            raise ValueError("row 3 is damaged")
        return u

    batches = data.prefetch(load, 0, 9)  # pyright: ignore
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3 is damaged"):
        next(batches)


def test_closed_prefetch_loads_no_more_and_leaves_no_thread():
    loaded, closing = [], threading.Event()

    def load(u):
        loaded.append(u)
        if u == 1:
            closing.wait(5)
        return u

    batches = data.prefetch(load, 0, 1000)  # pyright: ignore
    next(batches)
    threading.Timer(0.1, closing.set).start()
    batches.close()
    assert loaded in ([0], [0, 1])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
