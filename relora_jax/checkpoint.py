"""Checkpoints of a run: the state as a flat {path: array} with its meta (saved.py), by Orbax.

A checkpoint at u holds the state before the restart that u may begin with, so a resumed run performs it.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers as policies

from relora_jax import saved
from relora_jax.config import Config, changed_results
from relora_jax.paths import leaves, value_of
from relora_jax.program import abstract_state
from relora_jax.saved import META, STATE, DamagedError, OtherModelError, Saved, system_code
from relora_jax.steps import TrainState

NICE = 15  # of the threads that arrange a save, above the run's: a thirtieth of a core where all compute


class Checkpoints:
    """The checkpoints of one run, saved asynchronously; the last ones, and some for ever, are kept."""

    def __init__(self, workdir: Path, config: Config) -> None:
        saved.hush()
        train = config.train
        keep: list[Any] = [policies.LatestN(train.keep_last), policies.CustomSteps([snapshot_update(config)])]
        if train.keep_every:
            keep.append(policies.EveryNSteps(train.keep_every))
        self._config = config
        self._low_priority = ThreadPoolExecutor(1, "save", _lower_priority)
        self._manager = ocp.CheckpointManager(
            directory(workdir),
            item_handlers={
                STATE: ocp.PyTreeCheckpointHandler(use_compression=False),  # which would leave 92%
                META: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # of saves that did not end
            ),
        )

    def due(self, u: int) -> bool:
        """Whether the state after u updates is saved: by the cadence, at the end, at the snapshot."""
        config = self._config
        by_cadence = u > 0 and u % config.train.save_every_updates == 0
        return by_cadence or u in (snapshot_update(config), config.train.updates)

    def save(self, u: int, state: TrainState, *, low_priority: bool = False) -> None:
        """Begins to save; the state may be donated once this returns. OSError, also of the save before.

        `low_priority`: the updates that follow come first. Not where the run waits for the save.
        """
        if u not in self._manager.all_steps():
            self._write(u, flatten(state), low_priority=low_priority)

    def _write(self, u: int, arrays: dict[str, jax.Array], *, low_priority: bool = False) -> None:
        meta = saved.meta_of(u, self._config, arrays)
        args = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(arrays), META: ocp.args.JsonSave(meta)})
        with _as_os_error(self._manager.directory):
            if low_priority:
                _start_writers()
                self._low_priority.submit(self._manager.save, u, args=args).result()
            else:
                self._manager.save(u, args=args)

    def wait(self) -> None:
        """Until the newest save is whole. OSError where it could not be written."""
        with _as_os_error(self._manager.directory):
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._low_priority.shutdown()
            self._manager.close()


def _lower_priority() -> None:
    """This thread and those that it starts leave the cores to the updates; only Linux has that by thread."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            os.nice(NICE)


def _start_writers() -> None:
    """tensorstore's threads, which copy and write the bytes, in the run's own priority.

    They end when idle and begin in that of the thread that needs them; a save of gigabytes must not starve.
    """
    ts.array(np.zeros(1)).read().result()


def restore_newest(
    workdir: Path, config: Config, like: Callable[[int], TrainState]
) -> tuple[int, TrainState] | None:
    """(u, the state after u updates) of the newest whole checkpoint, placed as like(u); None: nothing saved.

    Where it is damaged the one before is taken, and the damaged ones are then renamed into workdir/damaged,
    each with a warning. ValueError for a checkpoint of another run or of something else, OSError where none
    can be read: nothing is renamed.
    """
    damaged: list[tuple[int, DamagedError]] = []
    for u in reversed(updates_saved(workdir)):
        try:
            state = _restore(workdir, u, config, like(u))
        except DamagedError as error:
            damaged.append((u, error))
            continue
        for lost, error in damaged:
            aside = _set_aside(workdir, lost)
            print(f"warning: {error}: renamed to {aside}, the checkpoint before is taken", file=sys.stderr)
        return u, state
    if damaged:
        raise OSError(f"no checkpoint of {workdir} is whole: {damaged[0][1]}")
    return None


def restore_model(workdir: Path, u: int, config: Config, like: TrainState) -> TrainState:
    """The state after u updates with nothing in it but its model, verified, placed as `like`.

    DamagedError, and nothing renamed; ValueError for a checkpoint of another run or of something else.
    """
    return _restore(workdir, u, config, model_of(like), whole=False)


def open_saved(workdir: Path, u: int, config: Config) -> Saved:
    """The checkpoint after u updates, of which nothing but the meta is read. Errors as `restore_model`."""
    one = Saved.open(path := directory(workdir) / str(u))
    if changed := changed_results(one.config, config):
        raise ValueError(f"{path} is of another run ({'; '.join(changed)}): move it away, or take its config")
    return one


def _restore(workdir: Path, u: int, config: Config, like: TrainState, *, whole: bool = True) -> TrainState:
    one = open_saved(workdir, u, config)
    try:
        return unflatten(one.read(flatten(like), whole=whole), like)
    except OtherModelError as error:  # though its config is ours
        raise DamagedError(str(error)) from error


def _set_aside(workdir: Path, u: int) -> Path:
    """Out of the directory: Orbax would neither overwrite the step nor save an earlier one."""
    folder = Path(workdir) / "damaged"
    folder.mkdir(exist_ok=True)
    names = (str(u), *(f"{u}.{k}" for k in range(2, 10_000)))
    aside = next(folder / name for name in names if not (folder / name).exists())
    (directory(workdir) / str(u)).rename(aside)
    return aside


@contextlib.contextmanager
def _as_os_error(folder: Any) -> Iterator[None]:
    """A full or broken disk as Python says it, whatever type tensorstore gave it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        code = system_code(error)
        if not code:
            raise
        raise OSError(code, str(error).rpartition(": ")[2].partition(" [")[0], str(folder)) from error


def directory(workdir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return (Path(workdir) / "checkpoints").absolute()


def snapshot_update(config: Config) -> int:
    """The update that the summed update is measured from, kept for ever: where the low-rank phase starts."""
    return config.relora.warm_start_updates


def updates_saved(workdir: Path) -> list[int]:
    """Updates of the checkpoints of a run, ascending; those of a save that did not end have another name."""
    folder = directory(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name))


def load_model(workdir: Path, update: int) -> dict[str, np.ndarray]:
    """The model's variables at a checkpoint, by path ("blocks/attention/q/kernel"), verified, on the host."""
    one = Saved.open(directory(workdir) / str(update))
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for path, leaf in flatten(model_of(abstract_state(one.config, update))).items()
    }
    arrays = one.read(like, whole=False)
    return {path.partition("/")[2]: np.asarray(array) for path, array in arrays.items()}


def model_of(state: TrainState) -> TrainState:
    """The state with nothing in it but the model's variables."""
    return TrainState(None, None, None, None, trained=state.trained, frozen=state.frozen, opt_state=None)


def flatten(state: TrainState) -> dict[str, Any]:
    """{path: array} of every leaf, in flatten order; the path names fields, attributes and indices."""
    return {"/".join(map(str, path)): value_of(leaf) for path, leaf in leaves(state)}


def unflatten(arrays: dict[str, jax.Array], like: TrainState) -> TrainState:
    """The state whose leaves `flatten` named."""
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in flatten(like)])
