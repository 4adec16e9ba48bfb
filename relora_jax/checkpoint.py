"""Checkpoints of a run: the state as a flat {path: array}, the update and the config, by Orbax.

A checkpoint at u holds the state before the restart that u may begin with, so a resumed run performs it.
"""

import logging
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from relora_jax.config import Config, to_json
from relora_jax.paths import leaves, value_of
from relora_jax.steps import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)


class Checkpoints:
    """The checkpoints of one run, saved asynchronously; the last ones, and some for ever, are kept."""

    def __init__(self, workdir: pathlib.Path, config: Config) -> None:
        train = config.train
        keep: list[Any] = [policies.LatestN(train.keep_last), policies.CustomSteps([snapshot_update(config)])]
        if train.keep_every:
            keep.append(policies.EveryNSteps(train.keep_every))
        self._config = config
        self._manager = ocp.CheckpointManager(
            directory(workdir),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep), enable_async_checkpointing=True
            ),
        )

    def latest(self) -> int | None:
        """The update of the newest whole checkpoint; None where there is none."""
        return self._manager.latest_step()

    def due(self, u: int) -> bool:
        """Whether the state after u updates is saved: by the cadence, at the end, at the snapshot."""
        config = self._config
        by_cadence = u > 0 and u % config.train.save_every_updates == 0
        return by_cadence or u in (snapshot_update(config), config.train.updates)

    def save(self, u: int, state: TrainState) -> None:
        """Begins to save; the state may be donated as soon as this returns."""
        meta = {"update": u, "config": to_json(self._config)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(flatten(state)), meta=ocp.args.JsonSave(meta))
        if u not in self._manager.all_steps():
            self._manager.save(u, args=args)

    def restore(self, u: int, like: TrainState) -> TrainState:
        """The state after u updates, in the shapes, types and shardings of `like`. ValueError if others."""
        expected = flatten(like)
        metadata = self._manager.item_metadata(u)["state"]
        found, wanted = _kinds(metadata or {}), _kinds(expected)
        for path in sorted(found.keys() | wanted.keys()):
            if found.get(path) != wanted.get(path):
                raise ValueError(
                    f"the checkpoint at update {u} of {self._manager.directory} is of another model: {path} "
                    f"is {_said(found.get(path))} there and {_said(wanted.get(path))} in this config"
                )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(expected))
        flat = self._manager.restore(u, args=args)["state"]
        return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in expected])

    def wait(self) -> None:
        """Returns when what was saved is on the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and frees the threads."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def directory(workdir: pathlib.Path) -> pathlib.Path:
    """Where a run's checkpoints lie."""
    return (pathlib.Path(workdir) / "checkpoints").absolute()


def snapshot_update(config: Config) -> int:
    """The update that the summed update is measured from, kept for ever: where the low-rank phase starts."""
    return config.relora.warm_start_updates


def updates_saved(workdir: pathlib.Path) -> list[int]:
    """Updates of the whole checkpoints of a run, ascending."""
    folder = directory(workdir)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def load_model(workdir: pathlib.Path, update: int) -> dict[str, np.ndarray]:
    """The model's variables at a checkpoint, by path ("blocks/attention/q/kernel"), on the host."""
    path = directory(workdir) / str(update) / "state"
    with ocp.StandardCheckpointer() as reader:
        metadata = reader.metadata(path).item_metadata
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=here) for k, v in metadata.items()}
        flat = reader.restore(path, like)
    parts = ("trained/", "frozen/")
    return {k.partition("/")[2]: np.asarray(v) for k, v in flat.items() if k.startswith(parts)}


def flatten(state: TrainState) -> dict[str, Any]:
    """{path: array} of every leaf, in flatten order; the path names fields, attributes and indices."""
    return {"/".join(map(str, path)): value_of(leaf) for path, leaf in leaves(state)}


def _kinds(arrays: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    return {path: (tuple(array.shape), np.dtype(array.dtype)) for path, array in arrays.items()}


def _said(kind: Any) -> str:
    return "absent" if kind is None else f"{kind[1]}{list(kind[0])}"
