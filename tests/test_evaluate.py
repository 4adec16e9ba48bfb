"""Perplexity is exp of the token-weighted mean, whatever the batches; padding weighs nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.data import Batch
from relora_jax.evaluate import evaluate
from relora_jax.model import token_loss
from relora_jax.program import Program
from tests import small


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(small.config(), small.mesh())


def rows() -> tuple[np.ndarray, np.ndarray]:
    ids, _ = small.rows(small.config(), 0)
    return ids.reshape(8, -1), np.array([13, 2, 7, 13, 5, 3, 13, 2], np.int32)


def test_evaluation_weighs_tokens_not_batches(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    parts = [Batch(jnp.asarray(ids[i : i + 4]), jnp.asarray(lengths[i : i + 4])) for i in (0, 4)]
    found = evaluate(program, state, parts)
    logits = program.phase.model(state.trained, state.frozen)(jnp.asarray(ids[:, :-1]))
    nats, count = token_loss(logits, jnp.asarray(ids), jnp.asarray(lengths))
    assert found.tokens == int(count) == (lengths - 1).sum()
    assert math.isclose(found.loss, float(nats) / int(count), rel_tol=1e-6)
    assert math.isclose(found.perplexity, math.exp(found.loss), rel_tol=1e-9)


def test_padding_rows_of_a_short_batch_weigh_nothing(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    whole = evaluate(program, state, [Batch(jnp.asarray(ids[:3]), jnp.asarray(lengths[:3]))])
    padded = lengths[:4] * np.array([1, 1, 1, 0], np.int32)
    same = evaluate(program, state, [Batch(jnp.asarray(ids[:4]), jnp.asarray(padded))])
    assert whole.tokens == same.tokens and math.isclose(whole.loss, same.loss, rel_tol=1e-6)


def test_evaluation_of_documents_apart_is_that_of_each_alone(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    ids[:, 2] = 0
    alone = np.zeros((16, ids.shape[1]), np.int32)
    alone[:8, :3], alone[8:, :-3] = ids[:, :3], ids[:, 3:]
    cut = np.concatenate([np.minimum(lengths, 3), np.maximum(lengths - 3, 0)])
    expected = evaluate(program, state, [Batch(jnp.asarray(alone), jnp.asarray(cut))])
    numbers = (np.arange(ids.shape[1]) > 2).astype(np.int32) + np.zeros_like(ids)
    found = evaluate(program, state, [Batch(*map(jnp.asarray, (ids, lengths, numbers)))])
    assert found.tokens == expected.tokens < (lengths - 1).sum()
    assert math.isclose(found.loss, expected.loss, rel_tol=1e-6)


def test_evaluation_in_both_phases_leaves_the_state_alone(program: Program) -> None:
    ids, lengths = rows()
    batches = [Batch(jnp.asarray(ids), jnp.asarray(lengths))]
    full = program.init()
    before = evaluate(program, full, batches)
    low = program.start_low_rank(full)
    copies = [np.asarray(leaf) for leaf in jax.tree.leaves(low)]
    after = evaluate(program, low, batches)
    assert math.isclose(before.loss, after.loss, rel_tol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(copies, jax.tree.leaves(low), strict=True))
