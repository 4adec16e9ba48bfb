"""Restores a whole state: reads it, verifies it, and places it on the devices."""

from collections.abc import Callable

from relora_jax.checkpoint.saved import (
    Checkpoint,
    DamagedError,
    OtherModelError,
    checkpoints_dir,
    updates_saved,
)
from relora_jax.config import Config, changed_results
from relora_jax.errors import UserError
from relora_jax.storage.location import AnyPath
from relora_jax.storage.writer import Writer
from relora_jax.training import processes
from relora_jax.training.state import TrainState, flatten, unflatten


def read_state(checkpoint: Checkpoint, like: TrainState) -> TrainState:
    """The state with the shapes, types and shardings of `like`; whatever is None in `like` is not read.

    OtherModelError if the arrays do not match `like`, DamagedError if one is not as it was saved.
    """
    whole = like.opt_state is not None
    return unflatten(checkpoint.read(flatten(like), whole=whole, together=processes.together), like)


def open_checkpoint(workdir: AnyPath, u: int, config: Config) -> Checkpoint:
    """A run's checkpoint after u updates; only its meta is read.

    DamagedError; UserError if the checkpoint belongs to another run or is not one of ours.
    """
    checkpoint = Checkpoint.open(path := checkpoints_dir(workdir) / str(u))
    if changed := changed_results(checkpoint.config, config):
        raise UserError(
            f"{path} belongs to another run ({'; '.join(changed)}): move it away, or use its config"
        )
    return checkpoint


def restore(workdir: AnyPath, u: int, config: Config, like: TrainState) -> TrainState:
    """The state of a run after u updates, as in `read_state`; errors as in `open_checkpoint`."""
    checkpoint = processes.together(lambda: open_checkpoint(workdir, u, config), DamagedError)
    try:
        return read_state(checkpoint, like)
    except OtherModelError as error:  # its config is this run's, so its arrays should be, too
        raise DamagedError(str(error)) from error


def restore_newest(
    writer: Writer, config: Config, like: Callable[[int], TrainState]
) -> tuple[int, TrainState] | None:
    """(u, state after u updates) from the newest intact checkpoint, placed as like(u), or None.

    Newer, damaged checkpoints are moved to workdir/damaged, each with a warning. UserError if a checkpoint
    belongs to another run or is not one of ours, OSError if none is intact: then nothing is moved.
    """
    workdir, damaged = writer.folder, list[tuple[int, DamagedError]]()
    for u in reversed(updates_saved(workdir)):
        try:
            state = restore(workdir, u, config, like(u))
        except DamagedError as error:
            damaged.append((u, error))
            continue
        for damaged_u, error in damaged:
            # Orbax would neither overwrite the step nor save an earlier one
            path = _free_path(workdir / "damaged", damaged_u)
            source = checkpoints_dir(workdir) / str(damaged_u)
            processes.together(lambda: writer.rename(source, path))  # noqa: B023 (called at once)
            writer.print(f"warning: {error}: moved to {path}, restoring an earlier checkpoint", warning=True)
        return u, state
    if damaged:
        raise OSError(f"no checkpoint in {workdir} is intact: {damaged[0][1]}")
    return None


def _free_path(folder: AnyPath, u: int) -> AnyPath:
    names = (str(u), *(f"{u}.{k}" for k in range(2, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())
