"""Activations on a mesh: their rows are split over `data` and `fsdp`, however the weights are sharded.

Without this, the partitioner follows a weight that is split over `fsdp`, and every device computes all rows.
"""

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

ROWS = ("data", "fsdp")


def on_rows(x: Array) -> Array:
    """x, with its first axis split over the axes ROWS of the mesh in whose context it is traced.

    Unchanged without such a mesh, or if it does not divide the rows. Other axes are left to the partitioner.
    """
    if not shared_by_devices(x):
        return x
    others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS, *others))


def with_whole_rows(table: Array) -> Array:
    """table [V, D], with each of its rows on one device: a lookup then needs no activation of other devices.

    Otherwise, every device would look up its part of D for all ids.
    """
    if _sharing_devices() == 1:
        return table
    return jax.lax.with_sharding_constraint(table, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def shared_by_devices(x: Array) -> bool:
    """Whether several devices share the rows of x: its first axis is split over them."""
    devices = _sharing_devices()
    return devices > 1 and x.shape[0] % devices == 0


def _sharing_devices() -> int:
    """The number of devices that share the rows of a batch."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in ROWS) if {*ROWS} <= {*mesh.axis_names} else 1
