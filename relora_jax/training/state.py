"""The complete state of a run, as a tree of arrays and as the flat {path: array} of a checkpoint."""

import dataclasses
from typing import Any

import jax

from relora_jax.core.paths import leaves, value_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Counters, trained and frozen variables, and optimizer state."""

    update: Any  # int32: u, the number of updates done
    tokens_seen: Any  # uint32[2]: counted targets, low and high 32 bits
    skipped: Any  # int32: updates skipped so far
    skipped_in_row: Any  # int32
    trained: Any  # nnx.State of Param and LowRankFactor
    frozen: Any  # nnx.State of core.low_rank.Frozen; empty before the low-rank phase
    opt_state: Any
    master: Any = dataclasses.field(default_factory=dict)  # {layer: BaseMaster}, in the host's memory


def is_low_rank(state: TrainState) -> bool:
    """Whether the state is in the low-rank phase."""
    return bool(jax.tree.leaves(state.frozen))


def model_of(state: TrainState) -> TrainState:
    """The state reduced to the model's variables; other fields are None."""
    return TrainState(None, None, None, None, trained=state.trained, frozen=state.frozen, opt_state=None)


def without_master(state: TrainState) -> TrainState:
    """The state as updates take it: only restarts need the master."""
    return dataclasses.replace(state, master={})


def flatten(state: TrainState) -> dict[str, Any]:
    """{path: array} of every leaf, in flatten order; paths consist of fields, attributes and indices."""
    return {"/".join(map(str, path)): value_of(leaf) for path, leaf in leaves(state)}


def unflatten(arrays: dict[str, jax.Array], like: TrainState) -> TrainState:
    """The inverse of `flatten`, with the structure of `like`."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in flatten(like)])
