"""Starts a run from another run's full-rank checkpoint, instead of a warm start of its own.

It provides u, tokens_seen, weights and the moments of embeddings, norms and head, so that arms can share one
warm start. A checkpoint without moments, of an imported model, provides only weights and starts at u = 0.
"""

from typing import Any

from relora_jax.checkpoint.restore import read_state
from relora_jax.checkpoint.saved import Checkpoint, DamagedError, checkpoints_dir, updates_saved
from relora_jax.config import RUN, Config, flatten
from relora_jax.errors import UserError
from relora_jax.run.record import read_facts
from relora_jax.storage.location import any_path
from relora_jax.training import names
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState, model_of

MAY_DIFFER = ("init_std", "compute_dtype")  # model settings that do not decide the function of the weights


def find(config: Config) -> Checkpoint:
    """The checkpoint of train.init_from at W = relora.warm_start_updates. UserError if there is none."""
    source, start = any_path(config.train.init_from), config.relora.warm_start_updates
    updates = updates_saved(source)
    if not updates:
        raise UserError(f"train.init_from {str(source)!r} holds no checkpoint: pass the directory of a run")
    if start not in updates:
        raise UserError(
            f"relora.warm_start_updates is {start} and train.init_from {str(source)!r} has checkpoints at "
            f"u = {', '.join(map(str, updates))}: set it to one of these"
        )
    try:
        checkpoint = Checkpoint.open(checkpoints_dir(source) / str(start))
        paths = checkpoint.specs
    except DamagedError as error:
        raise UserError(f"train.init_from cannot be used: {error}") from error
    _check_model(checkpoint, config)
    if start and not any(map(names.is_moment, paths)):
        raise UserError(
            f"train.init_from {str(source)!r} has no moments at u = {start}: set relora.warm_start_updates=0"
        )
    if any(map(names.is_frozen, paths)):
        low_rank_start = checkpoint.config.low_rank_start
        raise UserError(
            f"train.init_from {str(source)!r} is in its low-rank phase at u = {start}: "
            f"set relora.warm_start_updates to at most {low_rank_start}, where that phase starts"
        )
    return checkpoint


def check_tokenizer(config: Config, rows: dict[str, Any]) -> None:
    """UserError if the source run was trained with another tokenizer than `rows`, the keys of this run."""
    source = any_path(config.train.init_from)
    before, now = read_facts(source).get("rows", {}).get("train", {}), rows["train"]
    for key in ("tokenizer", "eos"):
        if key in before and before[key] != now[key]:
            raise UserError(
                f"train.init_from {str(source)!r} was trained with another tokenizer ({key}: {before[key]} "
                f"-> {now[key]}): set data.tokenizer to the one of that run"
            )


def _check_model(checkpoint: Checkpoint, config: Config) -> None:
    """UserError if the models compute different functions, even if their arrays have the same shapes."""
    if changed := differences(checkpoint.config, config):
        raise UserError(
            f"{checkpoint.path} is from another model ({'; '.join(changed)}): restore these settings"
        )


def differences(before: Config, now: Config) -> list[str]:
    """The settings of two models that make them different functions of their weights."""
    return [
        f"model.{key}: {value} -> {getattr(now.model, key)}"
        for key, value, field in flatten(before.model)
        if field.metadata != RUN and key not in MAY_DIFFER and value != getattr(now.model, key)
    ]


def load(checkpoint: Checkpoint, program: Program) -> TrainState:
    """The checkpoint's full-rank state, placed for the program. UserError for another model or damage."""
    like = program.full_rank
    try:
        if any(map(names.is_moment, checkpoint.specs)):
            return program.placed(read_state(checkpoint, like))
        model = read_state(checkpoint, model_of(like))
        return program.init_from(model.trained, model.frozen)  # draws no weights
    except DamagedError as error:
        raise UserError(f"train.init_from cannot be used: {error}") from error
