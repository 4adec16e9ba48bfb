"""One checkpoint on disk, read and verified: nothing of it is believed before it was compared.

A checkpoint is a directory named by its update, with two items by Orbax: `state`, a flat {path: array},
and `meta`, JSON: format, update, config, a checksum of each array, and a digest of all these.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from relora_jax.checkpoint.checksum import checksums
from relora_jax.config import Config, from_json, to_json
from relora_jax.errors import UserError

FORMAT = 1  # of a checkpoint: raise it with any change of the state's paths or of the meta
STATE, META = "state", "meta"
_ORBAX = {"_CHECKPOINT_METADATA", "commit_success.txt"}  # what it puts beside the items
_OF_A_FILE = ("Event loop is closed", "Encountered error while reading array index")
_OF_THE_FILES = (0, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)  # no error of disk or memory
_KINDS = {"format": int, "update": int, "config": str, "checksums": dict}  # of the meta's values


class DamagedError(Exception):
    """The checkpoint is ours and not as it was written: cut, altered or emptied."""


class OtherModelError(UserError):
    """The arrays of the checkpoint have other paths, shapes or types than those asked for."""


@functools.cache
def hush() -> None:
    """Orbax says an error once, by raising it: not in the log as well, nor for each file that follows."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def hear(error: Any) -> None:
        if not str(error.exc_value).startswith(_OF_A_FILE):
            hook(error)

    sys.unraisablehook = hear


def meta_of(update: int, config: Config, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """What is written beside the arrays."""
    sums = {path: int(value) for path, value in jax.device_get(checksums(arrays)).items()}
    meta = {"format": FORMAT, "update": update, "config": to_json(config), "checksums": sums}
    return {**meta, "digest": _digest(meta)}


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint whose meta is whole and whose directory holds nothing that is not ours."""

    path: Path
    update: int
    config: Config
    checksums: dict[str, int]

    @classmethod
    def open(cls, path: Path) -> "Saved":
        """Reads the meta alone. DamagedError; UserError where it is not ours and must stay as it is."""
        hush()
        _check_entries(path)
        meta = _read_meta(path)
        if meta["format"] != FORMAT:
            raise UserError(
                f"{path} has format {meta['format']}, this version reads {FORMAT}: take its version"
            )
        if str(meta["update"]) != path.name:
            raise UserError(f"{path} holds the checkpoint of update {meta['update']}: give it its name back")
        return cls(path, meta["update"], from_json(meta["config"]), meta["checksums"])

    def kinds(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, type) of each array, read without the arrays."""
        try:
            with ocp.StandardCheckpointer() as reader:
                return kinds_of(reader.metadata(self.path / STATE).item_metadata)
        except Exception as error:  # what it raises depends on which file is damaged
            raise _damaged(self.path, error) from error

    def read(self, like: dict[str, Any], *, whole: bool = True) -> dict[str, jax.Array]:
        """The arrays that `like` names, in its shapes, types and shardings; `whole`: no others may be there.

        OtherModelError before anything is read; DamagedError where they are not as they were written.
        """
        there, wanted = self.kinds(), kinds_of(like)
        for name in sorted(there.keys() | wanted.keys() if whole else wanted):
            if there.get(name) != wanted.get(name):
                raise OtherModelError(
                    f"{self.path} is of another model: {name} is {_said(there.get(name))} there and "
                    f"{_said(wanted.get(name))} here"
                )
        try:
            with ocp.PyTreeCheckpointer() as reader:
                how = ocp.checkpoint_utils.construct_restore_args(like)
                args = ocp.args.PyTreeRestore(item=like, restore_args=how, partial_restore=True)
                arrays = reader.restore(self.path / STATE, args=args)
        except Exception as error:
            raise _damaged(self.path, error) from error
        for name, value in jax.device_get(checksums(arrays)).items():
            if self.checksums.get(name) != int(value):
                raise DamagedError(
                    f"{self.path} was altered: {name} has another checksum than it was saved with"
                )
        return arrays


def checkpoints_dir(workdir: Path) -> Path:
    """Where a run's checkpoints lie."""
    return (Path(workdir) / "checkpoints").absolute()


def updates_saved(workdir: Path) -> list[int]:
    """Updates of the checkpoints of a run, ascending; those of a save that did not end have another name."""
    folder = checkpoints_dir(workdir)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name))


def kinds_of(arrays: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """(shape, type) of each array of a flat dictionary."""
    return {path: (tuple(array.shape), np.dtype(array.dtype)) for path, array in arrays.items()}


def _check_entries(path: Path) -> None:
    """UserError for links and for whatever we never write: it is not ours, and none of it is followed."""
    links = [path] if path.is_symlink() else []
    for folder, folders, files in os.walk(path):
        links += [Path(folder, name) for name in (*folders, *files) if Path(folder, name).is_symlink()]
    if links:
        raise UserError(f"{links[0]} is a link, and a checkpoint holds none: put the files themselves there")
    others = {entry.name for entry in path.iterdir()} - {STATE, META} - _ORBAX if path.is_dir() else set()
    if others:
        raise UserError(f"{path} is no checkpoint of relora_jax (it holds {min(others)}): move it away")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(path / META)
    except Exception as error:
        raise _damaged(path, error) from error
    another = UserError(f"{path} is no checkpoint of relora_jax (its meta is of another kind): move it away")
    if not isinstance(meta, dict) or not _KINDS.keys() & meta.keys():
        raise another
    written = meta.pop("digest", None)
    if written != _digest(meta):
        raise DamagedError(f"{path} was altered: its meta has another digest than it was saved with")
    if {key: type(value) for key, value in meta.items()} != _KINDS:
        raise another
    return meta


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _damaged(path: Path, error: Exception) -> DamagedError | OSError:
    """What reading met: damage, or a system that may read the same files well at another time."""
    reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
    code = system_code(error)
    if code in _OF_THE_FILES:
        return DamagedError(f"{path} cannot be read ({reason})")
    return OSError(code, reason, str(path))


def system_code(error: BaseException) -> int:
    """The system's number of what a library raised (tensorstore has it in its text), 0 where it has none."""
    said = re.search(r"os_error_code='(\d+)'", str(error))
    if said or isinstance(error, OSError):
        return int(said[1]) if said else getattr(error, "errno", None) or 0
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return errno.ENOMEM if out_of_memory else 0


def _said(kind: Any) -> str:
    return "absent" if kind is None else f"{kind[1]}{list(kind[0])}"
