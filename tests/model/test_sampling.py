"""Samples follow the model's distribution, with temperature and top_p applied, and nothing else."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.model.sampling import Request, draw, sample, split_text

V, EOS, PAD, VOCAB_SIZE, SIZE = 1000, 1, 0, 990, 13
DRAWS = 20_000


@jax.jit
def run(table: jax.Array, request: Request) -> tuple[jax.Array, jax.Array]:
    """Samples of a model whose logits depend on the position only: the rows of a table."""
    return sample(lambda ids, at: table[at][:, None], request)


def make_request(*lengths: int, **changes: Any) -> Request:
    """Four prompts of these lengths, filled with id 2, followed by ids to be ignored."""
    ids = np.where(np.arange(SIZE) < np.array(lengths)[:, None], 2, 7).astype(np.int32)
    fields = {"seed": 0, "max_tokens": SIZE, "temperature": 1.0, "top_p": 1.0}
    fields |= {"vocab_size": VOCAB_SIZE, "eos": np.array([EOS]), "pad": PAD}
    fields |= {"numbers": np.arange(4, dtype=np.int32)}
    return Request(ids=ids, lengths=np.array(lengths, np.int32), **(fields | changes))


def expected(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that `draw` samples from, in float64."""
    mass = np.exp((logits - logits.max()) / temperature)
    mass /= mass.sum()
    order = sorted(range(len(mass)), key=lambda i: (-mass[i], i))
    size = next((n for n in range(1, len(mass)) if mass[order[:n]].sum() >= top_p), len(mass))
    nucleus = np.zeros_like(mass)
    nucleus[order[:size]] = mass[order[:size]]
    return nucleus / nucleus.sum()


LOGITS = np.array([0.3, -1.0, 2.0, 2.0, 0.0, -math.inf, 1.2, 0.3, -4.0, 1.9])


@jax.jit
def drawn(keys: Any, logits: Any, temperature: float, top_p: float) -> jax.Array:
    return jax.vmap(lambda key: draw(key, logits, temperature=temperature, top_p=top_p))(keys)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.3, 1e-9])
def test_draws_come_from_the_fewest_ids_that_reach_top_p(temperature: float, top_p: float) -> None:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    counts = np.bincount(np.asarray(drawn(keys, jnp.float32(LOGITS), temperature, top_p)), minlength=10)
    mass = expected(LOGITS, temperature, top_p)
    assert not counts[mass == 0].any()
    assert (abs(counts / DRAWS - mass) <= 5 * np.sqrt(mass * (1 - mass) / DRAWS)).all()


def test_temperature_0_takes_the_most_likely_id_and_breaks_ties_by_the_lower_id() -> None:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    ids = {
        temperature: set(np.asarray(drawn(keys, jnp.float32(LOGITS), temperature, 1.0)).tolist())
        for temperature in (0.0, 1e-30)
    }
    assert ids == {0.0: {2}, 1e-30: {2, 3}}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_invalid_ids_are_never_drawn_whatever_the_logits(value: float) -> None:
    table = jnp.full((SIZE, V), value, jnp.float32).at[:, jnp.array([PAD, *range(VOCAB_SIZE, V)])].set(9.0)
    for changes in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        ids, lengths = map(np.asarray, run(table, make_request(1, 2, 3, 4, **changes)))
        drawn_ids = {int(i) for row, n in zip(ids, lengths, strict=True) for i in row[:n]}
        assert drawn_ids <= set(range(1, VOCAB_SIZE)) and (lengths > [1, 2, 3, 4]).all()


def test_pad_equal_to_eos_is_drawn() -> None:
    table = jnp.zeros((SIZE, V)).at[:, EOS].set(9.0)
    ids, lengths = run(table, make_request(1, 2, 3, 4, temperature=0.0, pad=EOS))
    assert lengths.tolist() == [2, 3, 4, 5] and ids[0, :3].tolist() == [2, EOS, 7]


COUNTING = jnp.float32(50.0 * jax.nn.one_hot(jnp.arange(SIZE) + 11, V))  # position p is followed by id p + 11


def test_samples_end_at_an_eos_max_tokens_or_the_end_of_the_row() -> None:
    ids, lengths = run(COUNTING, make_request(2, 5, 9, SIZE - 1, eos=np.array([17])))
    assert lengths.tolist() == [8, 8, SIZE, SIZE]
    assert ids[0].tolist() == [2, 2, 12, 13, 14, 15, 16, 17] + [7] * (SIZE - 8)
    assert ids[1].tolist() == [2] * 5 + [15, 16, 17] + [7] * (SIZE - 8)  # the first sample is still running
    assert ids[3].tolist() == [2] * (SIZE - 1) + [22]
    _, lengths = run(COUNTING, make_request(2, 5, 9, SIZE - 1, eos=np.array([17]), max_tokens=2))
    assert lengths.tolist() == [4, 7, 11, SIZE]
    ids, lengths = run(
        COUNTING, make_request(2, 3, 4, 5, eos=np.array([2]), max_tokens=3)
    )  # an EOS in the prompt does not end the sample
    assert lengths.tolist() == [5, 6, 7, 8] and ids[0, :6].tolist() == [2, 2, 12, 13, 14, 7]


def test_sample_ends_at_the_first_of_several_eos_ids_also_at_a_pad_among_them() -> None:
    # compiled anew for each number of eos ids
    several = jax.jit(lambda table, request: run.__wrapped__(table, request))
    _, lengths = several(COUNTING, make_request(2, 5, 9, SIZE - 1, eos=np.array([EOS, 20, 17])))
    assert lengths.tolist() == [8, 8, 11, SIZE]
    table = jnp.zeros((SIZE, V)).at[:, PAD].set(9.0)
    ids, lengths = several(table, make_request(1, 2, 3, 4, temperature=0.0, eos=np.array([EOS, PAD])))
    assert lengths.tolist() == [2, 3, 4, 5] and ids[0, :2].tolist() == [2, PAD]


def test_draws_depend_only_on_seed_number_and_position() -> None:
    def samples(*numbers: int, seed: int = 0) -> np.ndarray:
        request = make_request(3, 3, 3, 3, numbers=np.array(numbers, np.int32), seed=seed, eos=np.array([-1]))
        return np.asarray(run(jnp.zeros((SIZE, V)), request)[0])[:, 3:]

    ids = samples(0, 1, 2, 3)
    assert len(np.unique(ids)) >= ids.size - 5
    other = samples(2, 9, 0, 3)
    assert (other[[0, 2, 3]] == ids[[2, 0, 3]]).all() and (other[1] != ids[1]).any()
    assert (samples(0, 1, 2, 3, seed=1) != ids).mean() > 0.9
    assert run._cache_size() == 1  # no request triggers another compilation


def test_prompt_and_continuation_concatenate_to_the_text_of_all_ids() -> None:
    pieces = {2: b" the", 3: b" union", 4: b"caf\xc3", 5: b"\xa9"}

    def decode(ids: Any) -> str:
        return b"".join(pieces[int(i)] for i in ids).decode(errors="replace").removeprefix(" ")

    assert split_text(decode, [2, 3], prompt=1) == ("the", " union")
    assert split_text(decode, [2, 3], prompt=0) == ("", "the union")
    assert split_text(decode, [4, 5, 3], prompt=1) == ("caf", "\u00e9 union")
