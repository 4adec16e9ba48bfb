"""The way in for a whole state: read, verified, and placed on the devices."""

from collections.abc import Callable
from pathlib import Path

from relora_jax.checkpoint.saved import DamagedError, OtherModelError, Saved, checkpoints_dir, updates_saved
from relora_jax.config import Config, changed_results
from relora_jax.errors import UserError
from relora_jax.storage.writer import Writer
from relora_jax.training.state import TrainState, flatten, unflatten


def read_state(saved: Saved, like: TrainState) -> TrainState:
    """The state in the shapes, types and shardings of `like`; what is None in it is not read.

    OtherModelError for other arrays than these, DamagedError where one is not as it was saved.
    """
    return unflatten(saved.read(flatten(like), whole=like.opt_state is not None), like)


def open_saved(workdir: Path, u: int, config: Config) -> Saved:
    """The checkpoint of a run after u updates, of which nothing but the meta is read.

    DamagedError; UserError for a checkpoint of another run or of something else.
    """
    one = Saved.open(path := checkpoints_dir(workdir) / str(u))
    if changed := changed_results(one.config, config):
        raise UserError(f"{path} is of another run ({'; '.join(changed)}): move it away, or take its config")
    return one


def restore(workdir: Path, u: int, config: Config, like: TrainState) -> TrainState:
    """The state of a run after u updates, as `read_state` has it. Errors as `open_saved`."""
    one = open_saved(workdir, u, config)
    try:
        return read_state(one, like)
    except OtherModelError as error:  # though its config is ours
        raise DamagedError(str(error)) from error


def restore_newest(
    writer: Writer, config: Config, like: Callable[[int], TrainState]
) -> tuple[int, TrainState] | None:
    """(u, the state after u updates) of the newest whole checkpoint, placed as like(u); None: nothing saved.

    Where it is damaged the one before is taken, and the damaged ones are then renamed into workdir/damaged,
    each with a warning. UserError for a checkpoint of another run or of something else, OSError where none
    can be read: nothing is renamed.
    """
    workdir, damaged = writer.folder, list[tuple[int, DamagedError]]()
    for u in reversed(updates_saved(workdir)):
        try:
            state = restore(workdir, u, config, like(u))
        except DamagedError as error:
            damaged.append((u, error))
            continue
        for lost, error in damaged:
            # Orbax would neither overwrite the step nor save an earlier one
            aside = _free_name(workdir / "damaged", lost)
            writer.rename(checkpoints_dir(workdir) / str(lost), aside)
            writer.say(f"warning: {error}: renamed to {aside}, the checkpoint before is taken", warning=True)
        return u, state
    if damaged:
        raise OSError(f"no checkpoint of {workdir} is whole: {damaged[0][1]}")
    return None


def _free_name(folder: Path, u: int) -> Path:
    names = (str(u), *(f"{u}.{k}" for k in range(2, 10_000)))
    return next(folder / name for name in names if not (folder / name).exists())
