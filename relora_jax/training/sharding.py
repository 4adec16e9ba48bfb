"""The device mesh, and the rule that maps a variable's named axes to a PartitionSpec.

Mesh axes: the rows of a batch are split over `data` and `fsdp`, variables and their moments over `fsdp`;
`tensor` is reserved and must be 1.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relora_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
# Scans and merges iterate over layers, every device needs the full rank, and norms and biases are small.
UNSHARDED = ("layers", "rank", "norm", "bias")


def start_devices() -> list[Any]:
    """All devices of JAX's platform. UserError if it cannot start."""
    try:
        return jax.devices()
    except Exception as error:  # RuntimeError, or AssertionError if the platform's plugin is not installed
        platforms = jax.config.jax_platforms  # pyright: ignore
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        raise UserError(
            f"jax cannot start {f'the platform {platforms}' if platforms else 'its platform'} "
            f"({reason or 'it is not installed'}): set JAX_PLATFORMS=cpu, or fix its driver"
        ) from error


def mesh_shape(*, data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """(data, fsdp, tensor), data=-1 filled in; UserError if their product is not the number of devices."""
    data_size = max(devices // (fsdp * tensor), 1) if data == -1 else data
    if data_size * fsdp * tensor != devices:
        raise UserError(
            f"mesh.data {data} x mesh.fsdp {fsdp} x mesh.tensor {tensor} must equal the {devices} devices: "
            f"set mesh.data=-1, or values whose product is {devices}"
        )
    return data_size, fsdp, tensor


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: list[Any]) -> Mesh:
    """The devices as a data x fsdp x tensor mesh; sizes as in `mesh_shape`."""
    shape = mesh_shape(data=data, fsdp=fsdp, tensor=tensor, devices=len(devices))
    return Mesh(np.array(devices).reshape(shape), AXES)


def spec(axes: tuple[str, ...], shape: tuple[int, ...], *, fsdp: int) -> PartitionSpec:
    """Splits the first axis that may be sharded and is divisible by `fsdp`; replicates if there is none."""
    for index, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name not in UNSHARDED and size % fsdp == 0:
            return PartitionSpec(*(None,) * index, "fsdp")
    return PartitionSpec()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings: Variables are sharded by their `axes`, everything else is replicated."""

    def sharding(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = getattr(leaf, "axes", ())
        axis_names = axes if len(axes) == leaf.ndim else ("layers",) * leaf.ndim
        return leaf.replace(NamedSharding(mesh, spec(axis_names, leaf.shape, fsdp=mesh.shape["fsdp"])))

    return jax.tree.map(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def row_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Rows split over data and fsdp, for [accumulation, microbatch, ...] or [microbatch, ...] arrays."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS) if accumulated else PartitionSpec(ROWS))
