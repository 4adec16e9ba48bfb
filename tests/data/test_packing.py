import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_jax.data.packing import Packer

EOS, PAD = 1, 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=12)


def packed(packing, batches, length, bos=None):
    """(ids, lengths, tokens) of documents packed in batches."""
    packer = Packer(packing, length=length, eos=EOS, pad=PAD, bos=bos)
    rows = [packer.add([np.array(ids, np.int32) for ids in batch]) for batch in batches]
    ids = np.concatenate([np.empty((0, length + 1), np.int32), *(each.ids for each in rows)])
    return ids, [n for each in rows for n in each.lengths.tolist()], packer.tokens


def with_eos(documents):
    return [ids if ids[-1] == EOS else [*ids, EOS] for ids in documents if ids]


@settings(deadline=None, max_examples=100)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_concatenated_rows_are_consecutive_documents_each_with_one_eos(documents, length):
    stream = [i for ids in with_eos(documents) for i in ids]
    ids, lengths, tokens = packed("concatenate", [documents], length)
    whole = len(stream) // (length + 1)
    assert ids.dtype == np.int32 and ids.shape == (whole, length + 1)
    assert ids.ravel().tolist() == stream[: whole * (length + 1)]
    assert lengths == [length + 1] * whole and tokens == len(stream)


@settings(deadline=None, max_examples=100)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_truncated_rows_are_one_document_each_with_its_true_length(documents, length):
    ids, lengths, tokens = packed("truncate", [documents], length)
    with_target = [document for document in with_eos(documents) if len(document) > 1]
    assert ids.dtype == np.int32 and ids.shape == (len(with_target), length + 1)
    for row, n, document in zip(ids.tolist(), lengths, with_target, strict=True):
        assert row[:n] == document[: length + 1] and row[n:] == [PAD] * (length + 1 - n)
        assert n == min(len(document), length + 1)
    assert tokens == sum(map(len, with_eos(documents)))


@pytest.mark.parametrize("packing", ["concatenate", "truncate"])
@settings(deadline=None, max_examples=50)
@given(documents=DOCUMENTS, length=st.integers(1, 9))
def test_bos_is_packed_like_a_first_id_of_each_document(packing, documents, length):
    begun = [[7, *ids] for ids in documents if ids]
    one, other = packed(packing, [documents], length, bos=7), packed(packing, [begun], length)
    assert one[0].tolist() == other[0].tolist() and one[1:] == other[1:]


@pytest.mark.parametrize("packing", ["concatenate", "truncate"])
@settings(deadline=None, max_examples=50)
@given(documents=DOCUMENTS, cuts=st.lists(st.integers(0, 12), max_size=4), length=st.integers(1, 9))
def test_rows_do_not_depend_on_how_the_documents_are_batched(packing, documents, cuts, length):
    bounds = [0, *sorted(cuts), len(documents)]
    batches = [documents[a:b] for a, b in itertools.pairwise(bounds)]
    if sum(map(len, batches)) != len(documents):
        batches = [[document] for document in documents]
    one, many = packed(packing, [documents], length), packed(packing, batches, length)
    assert one[0].tolist() == many[0].tolist() and one[1:] == many[1:]
