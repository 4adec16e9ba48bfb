"""The mesh, and the one rule that maps the names of a variable's axes to a PartitionSpec.

Axes of the mesh: `data` and `fsdp` share the rows of a batch, `fsdp` also the variables and their moments;
`tensor` is kept for later and is 1.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relora_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")
# A scan or a merge walks the layers, every device needs all of the rank, and norms are small.
WHOLE = ("layers", "rank", "norm")


def start_devices() -> list[Any]:
    """All devices, after jax has started their platform. UserError where it cannot start."""
    try:
        return jax.devices()
    except Exception as error:  # RuntimeError; a bare assertion where jax lacks the plugin of the platform
        asked = jax.config.jax_platforms  # pyright: ignore
        reason = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0]
        raise UserError(
            f"jax cannot start {f'the platform {asked}' if asked else 'its platform'} "
            f"({reason or 'it is not installed'}): set JAX_PLATFORMS=cpu, or mend its driver"
        ) from error


def mesh_shape(*, data: int, fsdp: int, tensor: int, devices: int) -> tuple[int, int, int]:
    """data x fsdp x tensor = devices; data = -1: what the others leave. UserError if they misfit."""
    across = max(devices // (fsdp * tensor), 1) if data == -1 else data
    if across * fsdp * tensor != devices:
        raise UserError(
            f"mesh.data {data} x mesh.fsdp {fsdp} x mesh.tensor {tensor} must be the {devices} devices there "
            f"are: set mesh.data=-1, or values whose product is {devices}"
        )
    return across, fsdp, tensor


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: list[Any]) -> Mesh:
    """The devices as data x fsdp x tensor, as `mesh_shape` has it."""
    shape = mesh_shape(data=data, fsdp=fsdp, tensor=tensor, devices=len(devices))
    return Mesh(np.array(devices).reshape(shape), AXES)


def spec(axes: tuple[str, ...], shape: tuple[int, ...], *, fsdp: int) -> PartitionSpec:
    """The first axis that may be split and that `fsdp` divides, split; whole where there is none."""
    for place, (name, size) in enumerate(zip(axes, shape, strict=True)):
        if name not in WHOLE and size % fsdp == 0:
            return PartitionSpec(*(None,) * place, "fsdp")
    return PartitionSpec()


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding in the place of each array: by its `axes` where it is a Variable, else whole."""

    def sharding(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        axes = getattr(leaf, "axes", ())
        named = axes if len(axes) == leaf.ndim else ("layers",) * leaf.ndim
        return leaf.replace(NamedSharding(mesh, spec(named, leaf.shape, fsdp=mesh.shape["fsdp"])))

    return jax.tree.map(sharding, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def row_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Rows over data and fsdp: of [accumulation, microbatch, ...] or of [microbatch, ...] arrays."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS) if accumulated else PartitionSpec(ROWS))
