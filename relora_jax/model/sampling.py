"""Autoregressive sampling: prompts continued one id at a time.

Shapes: n samples, S ids per row, of which the model reads the first S - 1; V vocabulary.
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
    """Prompts and settings as arrays and numbers, so that requests of one shape share a program."""

    ids: Int[Any, "n S"]  # each row starts with its prompt; the rest is ignored
    lengths: Int[Any, " n"]  # of the prompts: 1 to S - 1
    numbers: Int[Any, " n"]  # of the samples: the random key depends on seed and number
    seed: int
    max_tokens: int  # at least 1
    temperature: float
    top_p: float
    vocab_size: int  # of the tokenizer: ids from here on are never drawn
    eos: Int[Any, " k"]  # each ends a sample
    pad: int  # never drawn unless it is one of `eos`


def sample(
    model: Callable[..., Float[Array, "n 1 V"]], request: Request
) -> tuple[Int[Array, "n S"], Int[Array, " n"]]:
    """(ids, lengths) of the prompts, continued until an EOS, `max_tokens` new ids or S ids in total.

    `model(ids, at=positions)` returns the logits at one position of each row. Up to rounding, a sample
    depends only on model, prompt, number and seed, not on the other samples.
    """
    rows, size = jnp.arange(request.ids.shape[0]), request.ids.shape[1]
    ends = jnp.minimum(request.lengths + request.max_tokens, size)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(request.seed), request.numbers)

    def is_active(ids: Array, lengths: Array) -> Array:
        ended = jnp.isin(ids[rows, lengths - 1], request.eos) & (lengths > request.lengths)
        return (lengths < ends) & ~ended

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        ids, lengths = state
        active = is_active(ids, lengths)
        logits = _mask_invalid(model(ids[:, :-1], at=jnp.where(active, lengths, 1) - 1)[:, 0], request)
        draw_one = partial(draw, temperature=request.temperature, top_p=request.top_p)
        drawn = jax.vmap(draw_one)(jax.vmap(jax.random.fold_in)(keys, lengths), logits)
        position = jnp.where(active, lengths, size)  # writes beyond the row are dropped
        return ids.at[rows, position].set(drawn, mode="drop"), lengths + active

    return lax.while_loop(
        lambda state: is_active(*state).any(), step, (jnp.asarray(request.ids), jnp.asarray(request.lengths))
    )


def draw(key: Array, logits: Float[Array, " V"], *, temperature: Any, top_p: Any) -> Int[Array, ""]:
    """An id drawn from softmax(logits / temperature), truncated to the fewest ids with total mass >= top_p.

    Temperature 0 takes the most likely id. Ties go to the lower id. Logits may be -inf.
    """
    order = jnp.argsort(-logits)
    ordered = logits[order]
    tempered = (ordered - ordered[0]) / jnp.maximum(temperature, jnp.finfo(logits.dtype).tiny)
    mass = jax.nn.softmax(tempered)
    in_nucleus = jnp.cumsum(mass) - mass < top_p
    choice = jax.random.categorical(key, jnp.where(in_nucleus, tempered, -jnp.inf))
    return order[jnp.where(temperature > 0, choice, 0)]


def _mask_invalid(logits: Float[Array, "n V"], request: Request) -> Float[Array, "n V"]:
    """Logits with -inf for pad and out-of-vocabulary ids; non-finite ones (diverged model) are replaced."""
    ids = jnp.arange(logits.shape[1])
    valid = (ids < request.vocab_size) & ((ids != request.pad) | jnp.isin(ids, request.eos))
    return jnp.where(valid, jnp.nan_to_num(logits), -jnp.inf)


def prompt_rows(
    prompts: Sequence[Any], *, size: int
) -> tuple[Int32[np.ndarray, "n S"], Int32[np.ndarray, " n"]]:
    """(ids, lengths) for a Request: each prompt at the start of a row of `size` ids."""
    ids = np.zeros((len(prompts), size), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, np.array([len(prompt) for prompt in prompts], np.int32)


def split_text(decode: Callable[[Any], str], ids: Any, *, prompt: int) -> tuple[str, str]:
    """(prompt, continuation) as text; the first `prompt` of the ids are the prompt's.

    All ids are decoded together, because pieces decode differently alone: the first loses its leading space,
    and part of a multi-byte character (which counts as continuation) is not text.
    """
    text = decode(ids)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(decode(ids[:prompt]), text, strict=False))
    split = len(list(same))
    return text[:split], text[split:]
