"""safetensors, a model's tensors in one file or several: read without trust, written by the library.

A directory holds `model.safetensors`, or `model.safetensors.index.json` and the files that it names. A file
is 8 bytes with the header's length, the header in JSON, and the tensors without a gap. Nothing is unpickled.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from relora_jax.errors import UserError
from relora_jax.hf import json_file
from relora_jax.storage import atomic

Kind = tuple[tuple[int, ...], np.dtype]  # shape and type of a tensor

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**8  # of a file; twice as much is in memory while it is written
PICKLES = ("*.bin", "*.pt", "*.pth")
HEADER_BYTES, INDEX_BYTES = 2**24, 2**26  # what is larger describes no model, and is not read
MOST_AXES = 64  # NumPy's own limit
# By their names in a file, in the order in which the library lays them out.
TYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(bfloat16), "F16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory: `kinds` is {name: (shape, type)} of all, from the headers alone."""

    folder: Path
    kinds: dict[str, Kind]
    _files: dict[str, Any] = dataclasses.field(repr=False)

    @classmethod
    def open(cls, folder: Path) -> "TensorFiles":
        """UserError where a file is missing, not as its header says, or of a kind that is not read here.

        A file may be a link, as in the hub's cache, but the index names only files of the directory.
        """
        folder = Path(folder)
        kinds: dict[str, Kind] = {}
        files: dict[str, Any] = {}
        for path, names in _named(folder).items():
            held, file = _open(path)
            for name in sorted(held.keys() if names is None else held.keys() | names):
                if name not in held:
                    raise UserError(f"{path} has no tensor {name!r}, which {INDEX} looks for in it")
                if names is not None and name not in names:
                    raise UserError(f"{path} has a tensor {name!r} that {INDEX} does not look for in it")
                kinds[name], files[name] = held[name], file
        return cls(folder, kinds, files)

    def read(self, name: str) -> np.ndarray:
        """The tensor of that name. OSError where the disk does not give it."""
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{self.folder}: {name!r} cannot be read ({json_file.shown(error)})") from error


def _named(folder: Path) -> dict[Path, set[str] | None]:
    """The files, each with the tensors that the index looks for in it; None: there is no index."""
    if (folder / FILE).is_file():  # transformers looks for it first, too
        return {folder / FILE: None}
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no directory: name the one that holds {FILE}")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which could run anything, and is not opened: load the model "
            "with transformers and save it by save_pretrained(folder, safe_serialization=True)"
        )
    raise UserError(f"{folder} has no {FILE}, nor {INDEX}: name the directory of a model")


def _indexed(index: Path) -> dict[Path, set[str] | None]:
    content = json_file.read(index, most_bytes=INDEX_BYTES)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index} is no index of tensors: it has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in places.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file.endswith(".safetensors")
        if not plain or "\0" in file or "\\" in file:
            raise UserError(f"{index} looks for {name!r} in {file!r}, which is no file of its directory")
        files.setdefault(index.parent / file, set()).add(name)  # pyright: ignore
    for path in files:
        if not os.path.isfile(path):  # never an error, whatever the name
            raise UserError(f"{str(path)!r} is missing, which {INDEX} names: bring it, too")
    return files


def _open(path: Path) -> tuple[dict[str, Kind], Any]:
    """({name: kind}, the library's lazy file); it compares header, offsets, shapes and length."""
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > HEADER_BYTES:
            raise json_file.broken(path, f"its header claims {length:,} bytes")
        header = raw.read(length)
    try:
        # pread: a file that is cut meanwhile is an error, where a map of it would be a SIGBUS
        file: Any = safe_open(path, framework="np", backend="pread")
    except SafetensorError as error:
        said = json_file.shown(error)
        raise json_file.broken(path, said.partition("header: ")[2] or said) from error
    json_file.parse(path, header)  # the library takes the last of two tensors of one name without a word
    return {name: _kind(path, name, file.get_slice(name)) for name in file.keys()}, file  # noqa: SIM118


def _kind(path: Path, name: str, tensor: Any) -> Kind:
    told, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if told not in TYPES:
        raise UserError(f"{path}: {name!r} is of the type {told}: only {', '.join(TYPES)} are read here")
    if 0 in shape or len(shape) > MOST_AXES:
        raise UserError(f"{path}: {name!r} has the shape {str(list(shape))[:60]}, which no tensor has")
    return shape, TYPES[told]


def save(folder: Path, groups: Sequence[Callable[[], dict[str, np.ndarray]]], *, stem: str = "model") -> None:
    """Writes the tensors {name: array} that each group gives to a file of its own, named as by transformers.

    One group is in memory at a time, and the library's copy of it. Where there are several groups an index is
    written last: without it nobody takes the files for a model. OSError where the disk does not take them.
    """
    places: dict[str, str] = {}
    parameters = size = 0
    for number, group in enumerate(groups, 1):
        several = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
        path, tensors = folder / f"{stem}{several}.safetensors", group()
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} cannot be written ({json_file.shown(error)})") from error
        path.chmod(mode)  # the library lets nobody else read it
        atomic.sync(path)
        places |= dict.fromkeys(tensors, path.name)
        parameters += sum(array.size for array in tensors.values())
        size += sum(array.nbytes for array in tensors.values())
    if len(groups) > 1:
        metadata = {"total_parameters": parameters, "total_size": size}
        index = json.dumps({"metadata": metadata, "weight_map": places}, indent=2, sort_keys=True)
        atomic.write(folder / f"{stem}.safetensors.index.json", f"{index}\n".encode())


def grouped(sizes: dict[str, int], limit: float = SHARD_BYTES) -> list[list[str]]:
    """Names in order, in groups of at most `limit` bytes; what is above it alone is a group of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    return groups
