"""The full-rank checkpoint of another run, with which a run begins in place of a warm start of its own.

u, tokens_seen, weights and the moments of embeddings, norms and head go along, so that arms share one warm
start; a checkpoint without moments, of an imported model, gives weights alone and begins at u = 0.
"""

from pathlib import Path
from typing import Any

from relora_jax.checkpoint.restore import read_state
from relora_jax.checkpoint.saved import DamagedError, Saved, checkpoints_dir, updates_saved
from relora_jax.config import RUN, Config, flatten
from relora_jax.errors import UserError
from relora_jax.run.record import read_facts
from relora_jax.training import names
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState, model_of

FREE = ("init_std", "compute_dtype")  # of the model's settings: what another run may choose for itself


def find(config: Config) -> Saved:
    """The checkpoint of train.init_from at W = relora.warm_start_updates. UserError where there is none."""
    source, start = Path(config.train.init_from).expanduser(), config.relora.warm_start_updates
    there = updates_saved(source)
    if not there:
        raise UserError(f"train.init_from {str(source)!r} holds no checkpoint: name the directory of a run")
    if start not in there:
        raise UserError(
            f"relora.warm_start_updates is {start} and train.init_from {str(source)!r} has checkpoints at "
            f"u = {', '.join(map(str, there))}: set it to one of these"
        )
    try:
        found = Saved.open(checkpoints_dir(source) / str(start))
        kinds = found.kinds()
    except DamagedError as error:
        raise UserError(f"train.init_from cannot be used: {error}") from error
    _check_model(found, config)
    if start and not any(map(names.is_moment, kinds)):
        raise UserError(
            f"train.init_from {str(source)!r} has no moments at u = {start}: only at u = 0 can it do without"
        )
    if any(map(names.is_frozen, kinds)):
        raise UserError(
            f"the checkpoint of train.init_from {str(source)!r} at u = {start} is of its low-rank phase, "
            f"which began at {found.config.low_rank_start}: relora.warm_start_updates can be at most that"
        )
    return found


def check_tokenizer(config: Config, rows: dict[str, Any]) -> None:
    """UserError where the source was trained with another tokenizer than `rows`, the keys of this run's."""
    source = Path(config.train.init_from).expanduser()
    before, now = read_facts(source).get("rows", {}).get("train", {}), rows["train"]
    for key in ("tokenizer", "eos"):
        if key in before and before[key] != now[key]:
            raise UserError(
                f"train.init_from {str(source)!r} was trained with another tokenizer ({key}: {before[key]} "
                f"-> {now[key]}): take its own as data.tokenizer"
            )


def _check_model(found: Saved, config: Config) -> None:
    """UserError for a model that computes something else, though its arrays may have the same shapes."""
    changed = [
        f"model.{key}: {was} -> {getattr(config.model, key)}"
        for key, was, field in flatten(found.config.model)
        if field.metadata != RUN and key not in FREE and was != getattr(config.model, key)
    ]
    if changed:
        raise UserError(f"{found.path} is of another model ({'; '.join(changed)}): set these as they were")


def load(found: Saved, program: Program) -> TrainState:
    """The full-rank state of `found`, placed for the program. UserError for another model or damage."""
    like = program.full_rank
    try:
        if any(map(names.is_moment, found.kinds())):
            return read_state(found, like)
        model = read_state(found, model_of(like))
        return program.begin_with(model.trained, model.frozen)  # no weights are drawn beside them
    except DamagedError as error:
        raise UserError(f"train.init_from cannot be used: {error}") from error
