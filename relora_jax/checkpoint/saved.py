"""One checkpoint on disk, verified as it is read.

A checkpoint is a directory named after its update, with two Orbax items: `state`, a flat {path: array}, and
`meta`, JSON with the format, update, config, a checksum of each array, and a digest of all these.
"""

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from relora_jax.checkpoint.checksum import checksum_on_host, checksums
from relora_jax.config import Config, from_json, to_json
from relora_jax.errors import UserError
from relora_jax.storage.location import AnyPath, entries, is_remote, is_store_error, store_errors_as_os_errors

FORMAT = 2  # of a checkpoint: increase it whenever the state's paths or the meta change
STATE, META = "state", "meta"
COMMIT = "commit_success.txt"
_ORBAX_FILES = {"_CHECKPOINT_METADATA", COMMIT}  # next to the items
_REPEATED_ERRORS = ("Event loop is closed", "Encountered error while reading array index")
_DAMAGE_CODES = (0, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)  # not a failing disk or memory
_BATCH_BYTES = 2**26  # of arrays that `verify` reads at once, or one larger array
# Orbax would take these for a pattern (so that a save becomes a checkpoint without arrays, without an error),
# TensorStore for a separator (so that it writes elsewhere), and both for a bucket; neither takes other bytes
# than UTF-8, which Python keeps as surrogates. An object store has no parent directory "..".
_IMPOSSIBLE = re.compile(r"[*?\[\\]|^/(?:gs|s3|az|hf)/|\w+:/|[\udc80-\udcff]|/\.\.(?=/)")
# In the errors of TensorStore: the store could not be asked, and what it holds may well be whole.
_NOT_READ = re.compile("ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED")
_META_TYPES = {"format": int, "update": int, "config": str, "checksums": dict}


class DamagedError(Exception):
    """The checkpoint is one of ours, but is not as it was written: truncated, altered or emptied."""


class OtherModelError(UserError):
    """The arrays of the checkpoint have other paths, shapes or types than the requested ones."""


@functools.cache
def quiet_orbax() -> None:
    """Hides the log lines and unraisable errors with which Orbax repeats an error that it also raises."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    previous_hook = sys.unraisablehook

    def hook(error: Any) -> None:
        if not str(error.exc_value).startswith(_REPEATED_ERRORS):
            previous_hook(error)

    sys.unraisablehook = hook


def make_meta(update: int, config: Config, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """The meta of a checkpoint."""
    sums = _sums(arrays)
    meta = {"format": FORMAT, "update": update, "config": to_json(config), "checksums": sums}
    return {**meta, "digest": _digest(meta)}


def _sums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """The checksum of each array; those in the memory of the host are on the devices one at a time."""
    on_host = {name for name, array in arrays.items() if array.sharding.memory_kind == "pinned_host"}
    sums = checksums({name: array for name, array in arrays.items() if name not in on_host})
    for name in sorted(on_host):
        sharding = arrays[name].sharding.with_memory_kind("device")
        sums |= jax.block_until_ready(checksums({name: jax.device_put(arrays[name], sharding)}))
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def _alone(step: Callable[[], Any], *_: type[Exception]) -> Any:
    return step()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose meta is intact and whose directory holds no foreign files."""

    path: AnyPath
    update: int
    config: Config
    checksums: dict[str, int]

    @classmethod
    def open(cls, path: AnyPath) -> "Checkpoint":
        """Reads the meta only. DamagedError; UserError if it is not one of ours."""
        quiet_orbax()
        _check_entries(path)
        meta = _read_meta(path)
        version, update = meta["format"], meta["update"]
        if version != FORMAT:
            raise UserError(
                f"{path} has format {version}, this version reads {FORMAT}: use the one that wrote it"
            )
        if str(update) != path.name:
            raise UserError(f"{path} holds the checkpoint of update {update}: rename it to {update}")
        return cls(path, update, from_json(meta["config"]), meta["checksums"])

    @functools.cached_property
    def specs(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """(shape, type) of each array, read once and without the arrays."""
        try:
            handler = ocp.StandardCheckpointHandler(multiprocessing_options=_this_process())
            with ocp.Checkpointer(handler, multiprocessing_options=_this_process()) as reader:
                return _specs(reader.metadata(self.path / STATE).item_metadata)
        except Exception as error:  # its type depends on which file is damaged
            raise _damaged(self.path, error) from error

    def read(
        self, like: dict[str, Any], *, whole: bool = True, together: Callable[..., Any] = _alone
    ) -> dict[str, jax.Array]:
        """The arrays in `like`, with its shapes, types and shardings; with `whole`, no others may exist.

        OtherModelError before anything is read; DamagedError if one is not as it was saved. Arrays on the
        devices of several processes are read by all of them, `processes.together`.
        """
        arrays = together(lambda: self._read(like, whole=whole), OtherModelError, DamagedError)
        for name, value in _sums(arrays).items():
            self._check_sum(name, value)
        return arrays

    def _read(self, like: dict[str, Any], *, whole: bool) -> dict[str, jax.Array]:
        saved, expected = self.specs, _specs(like)
        for name in sorted(saved.keys() | expected.keys() if whole else expected):
            if saved.get(name) != expected.get(name):
                raise OtherModelError(
                    f"{self.path} is from another model: {name} is {_format(saved.get(name))}, but "
                    f"{_format(expected.get(name))} in this model"
                )
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        args = ocp.args.PyTreeRestore(item=like, restore_args=restore_args, partial_restore=True)
        return self._restore(args)

    def check_arrays(self) -> None:
        """DamagedError if the arrays on disk have other names than the saved ones; reads none of them."""
        if different := self.specs.keys() ^ self.checksums.keys():
            raise DamagedError(f"{self.path} is not as it was saved: {min(different)} is missing or new")

    def verify(self) -> None:
        """Reads all arrays, a few at a time, on the host. DamagedError if one is not as it was saved."""
        self.check_arrays()
        for names in _batches(self.specs):
            on_host = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
            item = dict.fromkeys(names, 0)
            args = ocp.args.PyTreeRestore(item=item, restore_args=on_host, partial_restore=True)
            for name, array in self._restore(args).items():
                self._check_sum(name, checksum_on_host(array))

    def _restore(self, args: ocp.args.PyTreeRestore) -> dict[str, Any]:
        try:
            handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=_this_process())
            with ocp.Checkpointer(handler, multiprocessing_options=_this_process()) as reader:
                return reader.restore(self.path / STATE, args=args)
        except Exception as error:
            raise _damaged(self.path, error) from error

    def _check_sum(self, name: str, value: int) -> None:
        if self.checksums.get(name) != value:
            raise DamagedError(f"{self.path} was altered: {name} does not match its checksum")


def _this_process() -> ocp.options.MultiprocessingOptions:
    """Reading by one of several processes, while the others may not."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


def checkpoints_dir(workdir: AnyPath) -> AnyPath:
    """The directory of a run's checkpoints. UserError if Orbax cannot write them there, or read them."""
    folder = workdir / "checkpoints"
    if not is_remote(folder):
        folder = folder.absolute()
        if ".." in folder.parts:
            folder = folder.resolve()  # Orbax would drop "link/.."
    if impossible := _IMPOSSIBLE.search(str(folder).removeprefix("gs:/")):
        raise UserError(
            f"{str(folder.parent)!r} cannot hold checkpoints: they cannot be read back from a path with "
            f"{impossible[0]!r}: rename that directory, or choose another path"
        )
    return folder


def updates_saved(workdir: AnyPath) -> list[int]:
    """The updates of a run's checkpoints, ascending, without incomplete saves.

    These have other names, or in an object store no COMMIT, which Orbax writes last.
    """
    folder = checkpoints_dir(workdir)
    with store_errors_as_os_errors(folder):
        names = [path.name for path in entries(folder) if not is_remote(path) or (path / COMMIT).exists()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,9}", name))


def _specs(arrays: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    return {path: (tuple(array.shape), np.dtype(array.dtype)) for path, array in arrays.items()}


def _batches(specs: dict[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[list[str]]:
    """The arrays' names in groups of about _BATCH_BYTES, or of one larger array."""
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in specs.values()]
    starts = [end - size for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
    number = {name: start // _BATCH_BYTES for name, start in zip(specs, starts, strict=True)}
    for _, names in itertools.groupby(specs, number.__getitem__):
        yield list(names)


def _check_entries(path: AnyPath) -> None:
    """UserError for symbolic links, which are not followed, and for files that we never write."""
    if links := [] if is_remote(path) else list(_links(path)):
        raise UserError(f"{links[0]} is a symbolic link, not allowed in a checkpoint: put the files there")
    foreign = {f.name for f in path.iterdir()} - {STATE, META} - _ORBAX_FILES if path.is_dir() else set()
    if foreign:
        raise UserError(f"{path} is not a checkpoint of relora_jax (it holds {min(foreign)}): move it away")


def _links(path: Path) -> Iterator[Path]:
    """The symbolic links at and below a path."""
    entries = (Path(folder, name) for folder, *names in os.walk(path) for name in itertools.chain(*names))
    return (entry for entry in (path, *entries) if entry.is_symlink())


def _read_meta(path: AnyPath) -> dict[str, Any]:
    try:
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_this_process())
        with ocp.Checkpointer(handler, multiprocessing_options=_this_process()) as reader:
            meta = reader.restore(path / META)
    except Exception as error:
        raise _damaged(path, error) from error
    foreign = UserError(f"{path} is not a checkpoint of relora_jax (its meta has other fields): move it away")
    if not isinstance(meta, dict) or not _META_TYPES.keys() & meta.keys():
        raise foreign
    if meta.pop("digest", None) != _digest(meta):
        raise DamagedError(f"{path} was altered: its meta does not match its digest")
    if {key: type(value) for key, value in meta.items()} != _META_TYPES:
        raise foreign
    return meta


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _damaged(path: AnyPath, error: Exception) -> DamagedError | OSError:
    """A read error as DamagedError, or as OSError if the same files may well be read at another time."""
    reason = (str(error) or type(error).__name__).partition("\n")[0][:200]
    code = os_error_code(error)
    if is_remote(path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        code = code or errno.EIO  # "Forbidden", say
    if code in _DAMAGE_CODES:
        return DamagedError(f"{path} cannot be read ({reason})")
    return OSError(code, reason, str(path))


def os_error_code(error: BaseException) -> int:
    """The errno of an exception (tensorstore puts it in the message), 0 if it has none."""
    match = re.search(r"os_error_code='(\d+)'", str(error))
    if is_store_error(error) or (not match and _NOT_READ.search(str(error))):
        return errno.EIO
    if match or isinstance(error, OSError):
        return int(match[1]) if match else getattr(error, "errno", None) or 0
    out_of_memory = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return errno.ENOMEM if out_of_memory else 0


def _format(spec: Any) -> str:
    return "absent" if spec is None else f"{spec[1]}{list(spec[0])}"
