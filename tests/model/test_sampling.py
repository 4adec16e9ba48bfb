"""A sample is drawn from the model's own distribution, sharpened and cut, and from nothing beside it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.model.sampling import Request, draw, in_text, sample

V, EOS, PAD, VOCAB_SIZE, SIZE = 1000, 1, 0, 990, 13
DRAWS = 20_000


@jax.jit
def run(table: jax.Array, asked: Request) -> tuple[jax.Array, jax.Array]:
    """Samples of a model whose logits are the rows of a table, by place."""
    return sample(lambda ids, at: table[at][:, None], asked)


def request(*lengths: int, **changes: Any) -> Request:
    """Four prompts of these lengths, all of the id 2, before ids that mean nothing."""
    ids = np.where(np.arange(SIZE) < np.array(lengths)[:, None], 2, 7).astype(np.int32)
    plain = {"seed": 0, "max_tokens": SIZE, "temperature": 1.0, "top_p": 1.0}
    plain |= {"vocab_size": VOCAB_SIZE, "eos": EOS, "pad": PAD, "numbers": np.arange(4, dtype=np.int32)}
    return Request(ids=ids, lengths=np.array(lengths, np.int32), **(plain | changes))


def expected(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The distribution that `draw` draws from, in float64."""
    mass = np.exp((logits - logits.max()) / temperature)
    mass /= mass.sum()
    order = sorted(range(len(mass)), key=lambda i: (-mass[i], i))
    size = next((n for n in range(1, len(mass)) if mass[order[:n]].sum() >= top_p), len(mass))
    kept = np.zeros_like(mass)
    kept[order[:size]] = mass[order[:size]]
    return kept / kept.sum()


LOGITS = np.array([0.3, -1.0, 2.0, 2.0, 0.0, -math.inf, 1.2, 0.3, -4.0, 1.9])


@jax.jit
def drawn(keys: Any, logits: Any, temperature: float, top_p: float) -> jax.Array:
    return jax.vmap(lambda key: draw(key, logits, temperature=temperature, top_p=top_p))(keys)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.3, 1e-9])
def test_draws_come_from_the_fewest_ids_that_reach_top_p(temperature: float, top_p: float) -> None:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = np.bincount(np.asarray(drawn(keys, jnp.float32(LOGITS), temperature, top_p)), minlength=10)
    mass = expected(LOGITS, temperature, top_p)
    assert not found[mass == 0].any()
    assert (abs(found / DRAWS - mass) <= 5 * np.sqrt(mass * (1 - mass) / DRAWS)).all()


def test_temperature_0_takes_the_likeliest_and_of_equal_ones_the_first() -> None:
    keys = jax.random.split(jax.random.key(0), DRAWS)
    found = {
        temperature: set(np.asarray(drawn(keys, jnp.float32(LOGITS), temperature, 1.0)).tolist())
        for temperature in (0.0, 1e-30)
    }
    assert found == {0.0: {2}, 1e-30: {2, 3}}


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -math.inf])
def test_ids_without_a_meaning_are_never_drawn_whatever_the_model_says(value: float) -> None:
    table = jnp.full((SIZE, V), value, jnp.float32).at[:, jnp.array([PAD, *range(VOCAB_SIZE, V)])].set(9.0)
    for changes in ({}, {"temperature": 0.0}, {"top_p": 0.5}):
        ids, lengths = map(np.asarray, run(table, request(1, 2, 3, 4, **changes)))
        found = {int(i) for row, n in zip(ids, lengths, strict=True) for i in row[:n]}
        assert found <= set(range(1, VOCAB_SIZE)) and (lengths > [1, 2, 3, 4]).all()


def test_pad_that_ends_documents_is_drawn() -> None:
    table = jnp.zeros((SIZE, V)).at[:, EOS].set(9.0)
    ids, lengths = run(table, request(1, 2, 3, 4, temperature=0.0, pad=EOS))
    assert lengths.tolist() == [2, 3, 4, 5] and ids[0, :3].tolist() == [2, EOS, 7]


COUNTING = jnp.float32(50.0 * jax.nn.one_hot(jnp.arange(SIZE) + 11, V))  # what follows place p is p + 11


def test_samples_end_with_an_eos_at_max_tokens_or_where_the_row_does() -> None:
    ids, lengths = run(COUNTING, request(2, 5, 9, SIZE - 1, eos=17))
    assert lengths.tolist() == [8, 8, SIZE, SIZE]
    assert ids[0].tolist() == [2, 2, 12, 13, 14, 15, 16, 17] + [7] * (SIZE - 8)
    assert ids[1].tolist() == [2] * 5 + [15, 16, 17] + [7] * (SIZE - 8)  # while the first went on
    assert ids[3].tolist() == [2] * (SIZE - 1) + [22]
    _, lengths = run(COUNTING, request(2, 5, 9, SIZE - 1, eos=17, max_tokens=2))
    assert lengths.tolist() == [4, 7, 11, SIZE]
    ids, lengths = run(COUNTING, request(2, 3, 4, 5, eos=2, max_tokens=3))  # a prompt's own EOS ends nothing
    assert lengths.tolist() == [5, 6, 7, 8] and ids[0, :6].tolist() == [2, 2, 12, 13, 14, 7]


def test_chance_depends_on_seed_number_and_place_alone() -> None:
    def samples(*numbers: int, seed: int = 0) -> np.ndarray:
        asked = request(3, 3, 3, 3, numbers=np.array(numbers, np.int32), seed=seed, eos=-1)
        return np.asarray(run(jnp.zeros((SIZE, V)), asked)[0])[:, 3:]

    ids = samples(0, 1, 2, 3)
    assert len(np.unique(ids)) >= ids.size - 5
    other = samples(2, 9, 0, 3)
    assert (other[[0, 2, 3]] == ids[[2, 0, 3]]).all() and (other[1] != ids[1]).any()
    assert (samples(0, 1, 2, 3, seed=1) != ids).mean() > 0.9
    assert run._cache_size() == 1  # nothing that is asked for compiles anew


def test_prompt_and_continuation_are_together_the_text_of_all_ids() -> None:
    pieces = {2: b" the", 3: b" union", 4: b"caf\xc3", 5: b"\xa9"}

    def decode(ids: Any) -> str:
        return b"".join(pieces[int(i)] for i in ids).decode(errors="replace").removeprefix(" ")

    assert in_text(decode, [2, 3], prompt=1) == ("the", " union")
    assert in_text(decode, [2, 3], prompt=0) == ("", "the union")
    assert in_text(decode, [4, 5, 3], prompt=1) == ("caf", "\u00e9 union")
