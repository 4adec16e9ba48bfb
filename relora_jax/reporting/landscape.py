"""Where two runs have ended: the loss between and around their weights, and how alike their activations are.

Weights are those of the full-rank model, with the factors merged; the metrics are among those of arXiv
2605.13652. Shapes: B rows, L positions, D hidden.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from relora_jax.checkpoint.variables import Variables
from relora_jax.config import Config
from relora_jax.core.merge import HIGHEST
from relora_jax.core.paths import Path, map_leaves, path_key, value_of, with_value
from relora_jax.data.batches import Batch
from relora_jax.training import names, state
from relora_jax.training.evaluation import evaluate
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState

BETWEEN = np.linspace(-0.25, 1.25, 13)  # t of (1 - t) * first + t * second
AROUND = np.linspace(-0.5, 0.5, 11)  # s of weights + s * direction
MOST_TOKENS = 8192  # whose activations are compared

Line = list[tuple[float, float]]  # (t or s, nats per token)


def full_rank_program(config: Config, mesh: Any) -> Program:
    """The program of the full-rank model of a run of any arm."""
    return Program(dataclasses.replace(config, arm="full"), mesh)


def merged(variables: Variables, program: Program) -> TrainState:
    """The model of a checkpoint as a full-rank one, without the padding of a mesh."""

    def read(path: str, like: Any) -> Any:
        name = names.in_model(path)
        has_factors = variables.has_factors(name)
        array = np.stack(list(variables.merged_layers(name))) if has_factors else variables[name]
        return jax.device_put(array.astype(like.dtype), like.sharding)

    model = state.model_of(program.full_rank)
    arrays = {path: read(path, like) for path, like in state.flatten(model).items()}
    return state.unflatten(arrays, model)


def loss_between(
    program: Program, first: TrainState, second: TrainState, held_out: Sequence[Batch]
) -> Iterator[tuple[float, float]]:
    """(t, loss) along the line from the first model (t = 0) to the second (t = 1), and a little beyond."""
    yield from _along(program, first, _combined(-1.0, second, first), BETWEEN, held_out)


def loss_around(
    program: Program, model: TrainState, key: jax.Array, held_out: Sequence[Batch]
) -> Iterator[tuple[float, float]]:
    """(s, loss) along a random `direction` from the model (s = 0)."""
    yield from _along(program, model, direction(model, key), AROUND, held_out)


def barrier(line: Line) -> float:
    """How far the loss between two models is above the line between their losses, at most; in nats.

    The barrier of arXiv 2110.06296.
    """
    t, loss = np.array(line).T
    ends = np.interp([0.0, 1.0], t, loss)
    inside = (t >= 0) & (t <= 1)
    return float(np.max(loss[inside] - np.interp(t[inside], [0.0, 1.0], ends)))


def distance(first: TrainState, second: TrainState) -> float:
    """The norm of the difference of all weights, relative to the mean of their norms."""
    norms = [_norm(first), _norm(second)]
    return _norm(_combined(-1.0, first, second)) / float(np.mean(norms))


def direction(model: TrainState, key: jax.Array) -> TrainState:
    """A random direction in which each column of a matrix has the norm of that of the weights.

    In the embedding it is each row, the vector of a piece; norms and biases stay. This is the filter
    normalization of arXiv 1712.09913. With one key, models of one shape get the same draws, on any mesh.
    """
    return dataclasses.replace(model, trained=map_leaves(partial(_drawn, key), model.trained))


def activations(
    program: Program, model: TrainState, held_out: Sequence[Batch]
) -> Float[np.ndarray, "layers tokens D"]:
    """The residual stream after each block, of the first tokens of the batches; padding is left out."""
    parts, model = [], program.placed(model)
    for batch in held_out:
        hidden = np.asarray(program.hidden_states(model, batch), np.float32)
        inside = np.arange(hidden.shape[2]) < np.asarray(batch.lengths)[:, None]
        parts.append(hidden[:, inside])
        if sum(part.shape[1] for part in parts) >= MOST_TOKENS:
            break
    return np.concatenate(parts, axis=1)[:, :MOST_TOKENS]


def cka(
    first: Float[np.ndarray, "layers tokens D"], second: Float[np.ndarray, "layers2 tokens D"]
) -> Float[np.ndarray, "layers layers2"]:
    """Linear CKA of each layer of one model with each of the other: 1 is equal up to rotation and scale.

    |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms of centered activations X and Y [tokens, D]: arXiv
    1905.00414.
    """
    x, y = (of - of.mean(axis=1, keepdims=True) for of in (first, second))
    own = [[float(_cross(each, each)) for each in of] for of in (x, y)]
    return np.array([[float(_cross(a, b)) ** 2 for b in y] for a in x]) / np.outer(own[0], own[1])


@jax.jit
def _cross(x: Any, y: Any) -> jax.Array:
    """The Frobenius norm of X^T Y."""
    return jnp.sqrt(jnp.sum(jnp.square(jnp.einsum("nd,ne->de", x, y, precision=HIGHEST))))


def _along(
    program: Program, model: TrainState, step: TrainState, amounts: np.ndarray, held_out: Sequence[Batch]
) -> Iterator[tuple[float, float]]:
    for amount in amounts:
        moved = _combined(float(amount), model, step)
        yield float(amount), evaluate(program, program.placed(moved), held_out).loss


@jax.jit
def _combined(amount: Any, model: TrainState, step: TrainState) -> TrainState:
    """model + amount * step."""
    return jax.tree.map(lambda x, y: x + (amount * y).astype(x.dtype), model, step)


def _norm(model: TrainState) -> float:
    return float(np.sqrt(sum(float(jnp.sum(jnp.square(x))) for x in jax.tree.leaves(model))))


def _drawn(key: jax.Array, path: Path, leaf: Any) -> Any:
    weights = value_of(leaf)
    if {"norm", "bias"} & {*leaf.axes}:
        return with_value(leaf, jnp.zeros_like(weights))
    axis = -1 if leaf.axes == ("vocab", "embed") else -2
    draw = jax.random.normal(path_key(key, path), weights.shape, weights.dtype)
    sizes = [jnp.linalg.norm(array, axis=axis, keepdims=True) for array in (weights, draw)]
    return with_value(leaf, draw * sizes[0] / sizes[1])
