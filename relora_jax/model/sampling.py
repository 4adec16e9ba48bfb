"""Prompts continued piece by piece, each piece drawn from what the model expects next.

Shapes: n samples, S ids of a row, of which a model sees the first S - 1; V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32


class Request(NamedTuple):
    """What is asked for, in arrays and numbers alone: one compiled program serves all of one shape."""

    ids: Int[Any, "n S"]  # each begins with its prompt; what follows that is not looked at
    lengths: Int[Any, " n"]  # of the prompts: 1 to S - 1
    numbers: Int[Any, " n"]  # of the samples: with the seed they decide what chance draws
    seed: int
    max_tokens: int  # at least 1
    temperature: float
    top_p: float
    vocab_size: int  # of the tokenizer: no id from there on is drawn
    eos: int
    pad: int  # never drawn, unless it is eos


def sample(
    model: Callable[..., Float[Array, "n 1 V"]], asked: Request
) -> tuple[Int[Array, "n S"], Int[Array, " n"]]:
    """(ids, lengths) of the prompts continued to an EOS, to `max_tokens` more ids or to S.

    `model(ids, at=places)` gives the logits at one place of each row. A sample is a function of model,
    prompt, number and seed: those beside it change rounding at most.
    """
    rows, size = jnp.arange(asked.ids.shape[0]), asked.ids.shape[1]
    ends = jnp.minimum(asked.lengths + asked.max_tokens, size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(asked.seed), asked.numbers)

    def goes_on(ids: Array, lengths: Array) -> Array:
        ended = (ids[rows, lengths - 1] == asked.eos) & (lengths > asked.lengths)
        return (lengths < ends) & ~ended

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        ids, lengths = state
        on = goes_on(ids, lengths)
        logits = _possible(model(ids[:, :-1], at=jnp.where(on, lengths, 1) - 1)[:, 0], asked)
        chance = partial(draw, temperature=asked.temperature, top_p=asked.top_p)
        drawn = jax.vmap(chance)(jax.vmap(jax.random.fold_in)(keys, lengths), logits)
        place = jnp.where(on, lengths, size)  # a write beyond the row is none
        return ids.at[rows, place].set(drawn, mode="drop"), lengths + on

    return lax.while_loop(
        lambda state: goes_on(*state).any(), step, (jnp.asarray(asked.ids), jnp.asarray(asked.lengths))
    )


def draw(key: Array, logits: Float[Array, " V"], *, temperature: Any, top_p: Any) -> Int[Array, ""]:
    """An id from softmax(logits / temperature), of the fewest ids alone whose mass together reaches top_p.

    At temperature 0 the likeliest. Of equal ones the lower id counts as the likelier. Logits may be -inf.
    """
    order = jnp.argsort(-logits)
    falling = logits[order]
    tempered = (falling - falling[0]) / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    mass = jax.nn.softmax(tempered)
    kept = jnp.cumsum(mass) - mass < top_p
    place = jax.random.categorical(key, jnp.where(kept, tempered, -jnp.inf))
    return order[jnp.where(temperature > 0, place, 0)]


def _possible(logits: Float[Array, "n V"], asked: Request) -> Float[Array, "n V"]:
    """-inf where an id means nothing; what is not finite, of a diverged model, made so."""
    ids = jnp.arange(logits.shape[1])
    means = (ids < asked.vocab_size) & ((ids != asked.pad) | (ids == asked.eos))
    return jnp.where(means, jnp.nan_to_num(logits), -jnp.inf)


def windows(prompts: Sequence[Any], *, size: int) -> tuple[Int32[np.ndarray, "n S"], Int32[np.ndarray, " n"]]:
    """(ids, lengths) of a Request: the prompts at the beginnings of rows of `size` ids."""
    ids = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, np.array([len(prompt) for prompt in prompts], np.int32)


def in_text(decode: Callable[[Any], str], ids: Any, *, prompt: int) -> tuple[str, str]:
    """(prompt, continuation) of a sample's ids, the first `prompt` of which are the prompt's.

    Together they are the text of all ids: pieces mean less alone, such as the first without the space before
    it, or one byte of a character, which then counts to the continuation.
    """
    whole = decode(ids)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(decode(ids[:prompt]), whole, strict=False))
    shared = len(list(same))
    return whole[:shared], whole[shared:]
