"""safetensors, a model's tensors in one file or several: read without trust, written one tensor at a time.

A directory holds `model.safetensors`, or `model.safetensors.index.json` and the shards that it names. A file
is 8 bytes with the header's length, the header in JSON, and the tensors without a gap. Nothing is unpickled,
and no more than the tensor that is read or written is in memory.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open

from relora_jax.errors import UserError
from relora_jax.hf import json_file
from relora_jax.storage import atomic

Kind = tuple[tuple[int, ...], np.dtype]  # shape and type of a tensor

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
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


class TensorWriter:
    """The files of the tensors `kinds`, in transformers' way: each tensor written once, in any order.

    In their order they fill shards of at most `shard_bytes`; with more than one, an index is written last.
    The folder holds none of the files before; whole they are where the `with` ends well. OSError where the
    disk does not take them.
    """

    def __init__(
        self, folder: Path, kinds: dict[str, Kind], *, stem: str = "model", shard_bytes: float = SHARD_BYTES
    ) -> None:
        self._folder, self._kinds, self._left = Path(folder), kinds, set(kinds)
        self._index_file = self._folder / f"{stem}.safetensors.index.json"
        shards = _shards(kinds, shard_bytes)
        count = range(1, len(shards) + 1)
        several = (f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in count)
        one = [f"{stem}.safetensors"]
        self._shards = dict(zip(one if len(shards) == 1 else several, shards, strict=True))
        self._places: dict[str, tuple[Path, int]] = {}
        for file, names in self._shards.items():
            header, offsets = _header({name: kinds[name] for name in names})
            self._put(self._folder / file, 0, header, mode="xb")
            self._places |= {name: (self._folder / file, at) for name, at in offsets.items()}

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts the tensor in its place. UserError where it is not of its kind, or was written before."""
        if name not in self._left:
            raise UserError(f"{name!r} is not among the tensors that are still to be written")
        if (array.shape, array.dtype) != self._kinds[name]:
            raise UserError(f"{name!r} is {array.dtype}{list(array.shape)}, not {self._kinds[name]}")
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # bfloat16 gives no buffer by itself
        self._put(*self._places[name], flat.data)
        self._left.remove(name)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            return
        if self._left:
            raise RuntimeError(f"{len(self._left)} tensors were not written, such as {min(self._left)!r}")
        for file in self._shards:
            atomic.sync(self._folder / file)
        if len(self._shards) > 1:
            atomic.write(self._index_file, self._index())

    def _put(self, path: Path, at: int, content: Any, *, mode: Any = "r+b") -> None:
        try:
            with path.open(mode) as file:
                file.seek(at)
                file.write(content)
        except OSError as error:  # which names no file
            raise OSError(error.errno, error.strerror, str(path)) from error

    def _index(self) -> bytes:
        size = sum(map(_bytes, self._kinds.values()))
        count = sum(math.prod(shape) for shape, _ in self._kinds.values())
        index = {
            "metadata": {"total_parameters": count, "total_size": size},
            "weight_map": {name: file for file, names in self._shards.items() for name in names},
        }
        return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def _bytes(kind: Kind) -> int:
    return math.prod(kind[0]) * kind[1].itemsize


def _shards(kinds: dict[str, Kind], limit: float) -> list[list[str]]:
    """Names in order until one more would pass the limit; what is above it alone has a shard of its own."""
    shards: list[list[str]] = []
    current, filled = [], 0
    for name, kind in kinds.items():
        if _bytes(kind) > limit:
            shards.append([name])
            continue
        if filled + _bytes(kind) > limit:
            shards.append(current)
            current, filled = [], 0
        current.append(name)
        filled += _bytes(kind)
    return [*shards, current] if current or not shards else shards


def _header(kinds: dict[str, Kind]) -> tuple[bytes, dict[str, int]]:
    """(the file's beginning, where in the file each tensor begins), as the library lays them out."""
    types = list(TYPES.values())
    words = dict(zip(types, TYPES, strict=True))
    order = sorted(kinds, key=lambda name: (types.index(kinds[name][1]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in order:
        shape, kind = kinds[name]
        begins[name], end = end, end + _bytes(kinds[name])
        header[name] = {"dtype": words[kind], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {n: 8 + len(text) + at for n, at in begins.items()}
