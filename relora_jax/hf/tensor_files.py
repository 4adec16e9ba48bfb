"""safetensors: reads untrusted files of a model's tensors, and writes them.

A directory has `model.safetensors`, or `model.safetensors.index.json` and the files that it lists. A file is
the header's length in 8 bytes, the header as JSON, and the tensors without gaps. Nothing is unpickled.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from relora_jax.errors import UserError
from relora_jax.hf import json_file
from relora_jax.storage import atomic

Kind = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a tensor

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**8  # of a file; writing it takes twice as much memory
PICKLES = ("*.bin", "*.pt", "*.pth")
MAX_HEADER_BYTES, MAX_INDEX_BYTES = 2**24, 2**26
MAX_AXES = 64  # NumPy's limit
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(bfloat16), "F16": np.dtype(np.float16)}


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a directory; `kinds` is {name: (shape, dtype)}, from the headers alone."""

    folder: Path
    kinds: dict[str, Kind]
    _files: dict[str, Any] = dataclasses.field(repr=False)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        ignored: Callable[[str], bool] = lambda name: False,
        optional: Collection[str] = (),
    ) -> "TensorFiles":
        """UserError if a file is missing, differs from its header or the index, or has an unsupported format.

        A file may be a link, as in the hub's cache, but the index may only list files of the directory.
        Tensors whose names are `ignored` are left out; index and files may differ in the `optional` ones.
        """
        folder = Path(folder)
        kinds: dict[str, Kind] = {}
        files: dict[str, Any] = {}
        for path, names in _tensors_by_file(folder).items():
            file = _open(path)
            present = sorted(name for name in file.keys() if not ignored(name))  # noqa: SIM118
            for name in sorted([] if names is None else names.symmetric_difference(present)):
                if name not in optional and not ignored(name):
                    expects = "does not expect in it" if name in present else "expects in it"
                    problem = f"a tensor {name!r}" if name in present else f"no tensor {name!r}"
                    raise UserError(f"{path} has {problem}, which {INDEX} {expects}")
            kinds |= {name: _kind(path, name, file.get_slice(name)) for name in present}
            files |= dict.fromkeys(present, file)
        return cls(folder, kinds, files)

    def read(self, name: str) -> np.ndarray:
        """The tensor. OSError if it cannot be read from disk."""
        try:
            return self._files[name].get_tensor(name)
        except SafetensorError as error:
            raise OSError(f"{self.folder}: cannot read {name!r} ({json_file.printable(error)})") from error


def _tensors_by_file(folder: Path) -> dict[Path, set[str] | None]:
    """{file: names of its tensors in the index}; None instead of the names if there is no index."""
    if (folder / FILE).is_file():  # has precedence in transformers, too
        return {folder / FILE: None}
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a directory: pass the directory of a model")
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder / pickles[0]} is a pickle, which could execute code, and is not read: load the model "
            "with transformers and save it with save_pretrained(folder, safe_serialization=True)"
        )
    raise UserError(f"{folder} has no {FILE} or {INDEX}: pass the directory of a model")


def _read_index(index: Path) -> dict[Path, set[str] | None]:
    content = json_file.read(index, max_bytes=MAX_INDEX_BYTES)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} has no weight_map: download it again")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        plain = isinstance(file, str) and file == os.path.basename(file) and file.endswith(".safetensors")
        if not plain or "\0" in file or "\\" in file:
            raise UserError(
                f"{index} lists {name!r} in {file!r}, which is not a .safetensors file of its directory"
            )
        files.setdefault(index.parent / file, set()).add(name)  # pyright: ignore
    for path in files:
        if not os.path.isfile(path):  # unlike Path.is_file, never raises
            raise UserError(f"{str(path)!r} is missing, but {INDEX} lists it: download it too")
    return files


def _open(path: Path) -> Any:
    """The lazy file; the library validates the header, offsets, shapes and length."""
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise json_file.invalid(path, f"its header claims {length:,} bytes")
        header = raw.read(length)
    try:
        # pread: reading a file that was truncated after it was opened is an error, with mmap a SIGBUS
        file: Any = safe_open(path, framework="np", backend="pread")
    except SafetensorError as error:
        message = json_file.printable(error)
        raise json_file.invalid(path, message.partition("header: ")[2] or message) from error
    json_file.parse(path, header)  # the library silently takes the last of duplicate names
    return file


def _kind(path: Path, name: str, tensor: Any) -> Kind:
    dtype, shape = tensor.get_dtype(), tuple(tensor.get_shape())
    if dtype not in DTYPES:
        raise UserError(f"{path}: {name!r} has dtype {dtype}: only {', '.join(DTYPES)} are supported")
    if 0 in shape or len(shape) > MAX_AXES:
        raise UserError(f"{path}: {name!r} has the unsupported shape {str(list(shape))[:60]}")
    return shape, DTYPES[dtype]


def save(folder: Path, shards: Sequence[Callable[[], dict[str, np.ndarray]]], *, stem: str = "model") -> None:
    """Writes the {name: array} that each function returns to its own file, named as by transformers.

    One shard and the library's copy of it are in memory at a time. The index of several shards is written
    last, so that nothing loads a partial model. OSError if the disk fails.
    """
    weight_map: dict[str, str] = {}
    parameters = size = 0
    for number, shard in enumerate(shards, 1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path, tensors = folder / f"{stem}{suffix}.safetensors", shard()
        path.touch()
        mode = path.stat().st_mode
        try:
            save_file(tensors, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"cannot write {path} ({json_file.printable(error)})") from error
        path.chmod(mode)  # the library restricts it to the owner
        atomic.sync(path)
        weight_map |= dict.fromkeys(tensors, path.name)
        parameters += sum(array.size for array in tensors.values())
        size += sum(array.nbytes for array in tensors.values())
    if len(shards) > 1:
        metadata = {"total_parameters": parameters, "total_size": size}
        index = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True)
        atomic.write(folder / f"{stem}.safetensors.index.json", f"{index}\n".encode())


def group_by_size(sizes: dict[str, int], limit: float = SHARD_BYTES) -> list[list[str]]:
    """The names in order, in groups of at most `limit` bytes; a larger one has a group of its own."""
    groups: list[list[str]] = [[]]
    total = 0
    for name, size in sizes.items():
        if groups[-1] and total + size > limit:
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return groups
