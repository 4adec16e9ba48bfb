"""The way out: a run's state saved as a flat {path: array} with its meta (saved.py), by Orbax.

A checkpoint at u holds the state before the restart that u may begin with, so a resumed run performs it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from relora_jax.checkpoint import saved
from relora_jax.checkpoint.saved import META, STATE, checkpoints_dir, system_code
from relora_jax.config import Config
from relora_jax.training.state import TrainState, flatten


class Checkpoints:
    """The checkpoints of one run, saved asynchronously; the last ones, and some for ever, are kept."""

    def __init__(self, workdir: Path, config: Config) -> None:
        saved.hush()
        train = config.train
        keep: list[Any] = [policies.LatestN(train.keep_last), policies.CustomSteps([snapshot_update(config)])]
        if train.keep_every:
            keep.append(policies.EveryNSteps(train.keep_every))
        self._config = config
        self._manager = ocp.CheckpointManager(
            checkpoints_dir(workdir),
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

    def save(self, u: int, state: TrainState) -> None:
        """Begins to save; the state may be donated once this returns. OSError, also of the save before."""
        if u not in self._manager.all_steps():
            self._write(u, flatten(state))

    def _write(self, u: int, arrays: dict[str, jax.Array]) -> None:
        meta = saved.meta_of(u, self._config, arrays)
        args = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(arrays), META: ocp.args.JsonSave(meta)})
        with _as_os_error(self._manager.directory):
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
            self._manager.close()


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


def snapshot_update(config: Config) -> int:
    """The update that the summed update is measured from, kept for ever: where the low-rank phase starts."""
    return config.relora.warm_start_updates
