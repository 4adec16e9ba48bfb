"""Saves a run's state with Orbax, as a flat {path: array} and its meta (saved.py).

If update u begins with a restart, the checkpoint at u is from before it: a resumed run repeats the restart.
"""

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from relora_jax.checkpoint import saved
from relora_jax.checkpoint.saved import (
    META,
    STATE,
    Checkpoint,
    DamagedError,
    checkpoints_dir,
    os_error_code,
)
from relora_jax.config import Config
from relora_jax.errors import UserError
from relora_jax.storage.location import AnyPath
from relora_jax.training import processes
from relora_jax.training.state import TrainState, flatten


class Checkpoints:
    """Saves the checkpoints of one run asynchronously and deletes those that it need not keep.

    Leaving the `with` without an error reads the last one back: OSError if it is not as it was saved.
    """

    def __init__(self, workdir: AnyPath, config: Config) -> None:
        saved.quiet_orbax()
        train = config.train
        keep: list[Any] = [policies.LatestN(train.keep_last), policies.CustomSteps([snapshot_update(config)])]
        if train.keep_every:
            keep.append(policies.EveryNSteps(train.keep_every))
        self._config = config
        self._folder = checkpoints_dir(workdir)
        self._last: int | None = None  # update of the last save, complete or not
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_handlers={
                STATE: ocp.PyTreeCheckpointHandler(use_compression=False),  # it saves only 8%
                META: ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                enable_async_checkpointing=True,
                cleanup_tmp_directories=True,  # of killed saves
            ),
        )

    def due(self, u: int) -> bool:
        """Whether the state after u updates must be saved: by cadence, as the snapshot, or as the last."""
        config = self._config
        by_cadence = u > 0 and u % config.train.save_every_updates == 0
        return by_cadence or u in (snapshot_update(config), config.train.updates)

    def save(self, u: int, state: TrainState) -> None:
        """Starts a save; the state may be donated once this returns. OSError if it or the last one fails."""
        self.wait()
        if u not in self._manager.all_steps():
            self._write(u, flatten(state))

    def _write(self, u: int, arrays: dict[str, jax.Array]) -> None:
        meta = saved.make_meta(u, self._config, arrays)
        args = ocp.args.Composite(**{STATE: ocp.args.PyTreeSave(arrays), META: ocp.args.JsonSave(meta)})
        with _as_os_error(self._folder):
            if not self._manager.save(u, args=args):
                raise OSError(
                    errno.EEXIST, "not saved, because of another checkpoint", str(self._folder / str(u))
                )
        self._last = u

    def wait(self) -> None:
        """Waits until the last save is complete. OSError if it failed or lacks arrays."""
        self._finish()
        with _as_os_error(self._folder):
            if self._last is not None:
                processes.together(self._opened(self._last).check_arrays, DamagedError)

    def _finish(self) -> None:
        with _as_os_error(self._folder):
            self._manager.wait_until_finished()

    def _verify(self) -> None:
        if self._last is not None and processes.is_writer():
            self._opened(self._last).verify()

    def _opened(self, u: int) -> Checkpoint:
        return Checkpoint.open(self._folder / str(u))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is not None:
                self._finish()  # without a check: a save that failed would replace the error that says why
                return
            self.wait()
            with _as_os_error(self._folder):
                processes.together(self._verify, DamagedError)
        finally:
            self._manager.close()


@contextlib.contextmanager
def _as_os_error(folder: Any) -> Iterator[None]:
    """Turns tensorstore's error for a full or broken disk, and damage of what was saved, into an OSError."""
    try:
        yield
    except OSError:
        raise
    except (DamagedError, UserError) as error:
        raise OSError(f"the save failed: {error}") from error
    except Exception as error:
        code = os_error_code(error)
        if not code:
            raise
        raise OSError(code, str(error).rpartition(": ")[2].partition(" [")[0], str(folder)) from error


def snapshot_update(config: Config) -> int:
    """W, where the low-rank phase starts and the summed update is measured from: its checkpoint is kept."""
    return config.relora.warm_start_updates
