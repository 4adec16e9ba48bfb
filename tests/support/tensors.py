"""Toy safetensors files."""

import pathlib

import numpy as np

from relora_jax.hf import tensor_files


def write_tensors(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], *, shard_bytes: float = 10**9
) -> None:
    """Writes the tensors in files of at most `shard_bytes`."""
    groups = tensor_files.group_by_size({name: array.nbytes for name, array in tensors.items()}, shard_bytes)
    files = [{name: np.array(tensors[name], order="C") for name in group} for group in groups]
    tensor_files.save(folder, [lambda file=file: file for file in files])
