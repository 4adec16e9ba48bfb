"""All that a run is, as one tree of arrays, and as the flat {path: array} that a checkpoint holds."""

import dataclasses
from typing import Any

import jax

from relora_jax.core.paths import leaves, value_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Counters, the trained and the frozen variables, the optimizer's state."""

    update: Any  # int32: u, the updates done
    tokens_seen: Any  # uint32[2]: counted targets, low and high word
    skipped: Any  # int32: updates skipped so far
    skipped_in_row: Any  # int32
    trained: Any  # nnx.State of Param and LoRAParam
    frozen: Any  # nnx.State of BaseKernel; empty before the low-rank phase
    opt_state: Any


def is_low_rank(state: TrainState) -> bool:
    """Whether the state is of the low-rank phase."""
    return bool(jax.tree.leaves(state.frozen))


def model_of(state: TrainState) -> TrainState:
    """The state with nothing in it but the model's variables."""
    return TrainState(None, None, None, None, trained=state.trained, frozen=state.frozen, opt_state=None)


def flatten(state: TrainState) -> dict[str, Any]:
    """{path: array} of every leaf, in flatten order; the path names fields, attributes and indices."""
    return {"/".join(map(str, path)): value_of(leaf) for path, leaf in leaves(state)}


def unflatten(arrays: dict[str, jax.Array], like: TrainState) -> TrainState:
    """The state whose leaves `flatten` named."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in flatten(like)])
