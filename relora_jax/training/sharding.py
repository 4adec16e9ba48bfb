"""The device mesh, and the rule that maps a variable's named axes to a PartitionSpec.

Mesh axes: the rows of a batch are split over `data` and `fsdp`, variables and their moments over `fsdp` and
`tensor`. JAX splits an axis only into equal parts, so that on the devices, the axes that `tensor` splits are
padded with zeros. The steps (steps.py) compute without them: the partitioner cuts such an axis at no cost,
and everything that depends on a shape (random draws, pruning, checkpoints) is the same on any mesh.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relora_jax.core.low_rank import BaseMaster
from relora_jax.errors import UserError
from relora_jax.model.rows import ROWS

AXES = ("data", "fsdp", "tensor")
# Scans and merges iterate over layers, every device needs the full rank, and norms and biases are small.
UNSHARDED = ("layers", "rank", "norm", "bias")
# Outputs of q, k, v, gate and up, inputs of o and down, and the vocabulary: what `tensor` splits.
TENSOR_AXES = ("heads", "mlp", "vocab")


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


def spec(axes: tuple[str, ...], shape: tuple[int, ...], *, fsdp: int, tensor: int = 1) -> PartitionSpec:
    """`tensor` splits the axis in TENSOR_AXES, `fsdp` the first other one that it divides, or else that one.

    If `tensor` does not divide its axis, it splits the one of `fsdp`. What cannot be split is replicated.
    """
    parts: list[Any] = [None] * len(axes)
    split = [index for index, name in enumerate(axes) if name in TENSOR_AXES]
    others = [index for index, name in enumerate(axes) if name not in (*TENSOR_AXES, *UNSHARDED)]
    groups: list[Any] = ["fsdp"]
    if tensor > 1 and split:
        if shape[split[0]] % tensor == 0:
            parts[split[0]] = "tensor"
        else:
            groups.insert(0, ("fsdp", "tensor"))
    for group in groups:
        size = fsdp if group == "fsdp" else fsdp * tensor
        for index in (*others, *split):
            if parts[index] is None and shape[index] % size == 0:
                parts[index] = group
                return PartitionSpec(*parts[: 1 + max(i for i, part in enumerate(parts) if part)])
    return PartitionSpec(*parts[: 1 + max((i for i, part in enumerate(parts) if part), default=-1)])


def axes_of(leaf: nnx.Variable[Any]) -> tuple[str, ...]:
    """The names of a variable's axes; without names, none is split."""
    axes = getattr(leaf, "axes", ())
    return axes if len(axes) == leaf.ndim else ("layers",) * leaf.ndim


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A tree of NamedShardings: Variables are sharded by their `axes`, everything else is replicated.

    A `BaseMaster` is in the memory of the hosts.
    """

    def sharding(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, PartitionSpec())
        memory = "pinned_host" if isinstance(leaf, BaseMaster) else None
        parts = spec(axes_of(leaf), leaf.shape, **_split_sizes(mesh))
        return leaf.replace(NamedSharding(mesh, parts, memory_kind=memory))

    return jax.tree.map(sharding, tree, is_leaf=_is_variable)


def padded(tree: Any, mesh: Any) -> Any:
    """The tree with each Variable's axes in TENSOR_AXES padded with zeros to multiples of `tensor`.

    But for a `BaseMaster`, which nothing is computed with where it is.
    """

    def pad(leaf: Any) -> Any:
        if (
            not _is_variable(leaf)
            or isinstance(leaf, BaseMaster)
            or (shape := _padded_shape(leaf, mesh)) == leaf.shape
        ):
            return leaf
        widths = [(0, new - old) for new, old in zip(shape, leaf.shape, strict=True)]
        return leaf.replace(jnp.pad(leaf.get_value(), widths))

    return jax.tree.map(pad, tree, is_leaf=_is_variable)


def unpadded(tree: Any, like: Any) -> Any:
    """Each array cut to the shape of its counterpart in `like`."""
    return jax.tree.map(
        lambda x, to: x if x.shape == to.shape else x[tuple(map(slice, to.shape))], tree, like
    )


def on_mesh(function: Callable[..., Any], mesh: Mesh, *like: Any) -> Callable[..., Any]:
    """`function` as it is compiled for the mesh: its first arguments unpadded to `like`, its result padded.

    It is traced in the mesh's context, where the model splits its activations (model/rows.py).
    """

    @functools.wraps(function)
    def traced(*args: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            cut = [unpadded(arg, to) for arg, to in zip(args, like, strict=False)]
            return padded(function(*cut, *args[len(like) :], **options), mesh)

    return traced


def as_stored(tree: Any) -> Any:
    """The tree with each unpadded Variable sharded as in the state on the mesh of the context, if any."""
    mesh = jax.sharding.get_abstract_mesh()
    if not {*AXES} <= {*mesh.axis_names}:
        return tree

    def constrain(leaf: Any) -> Any:
        if not _is_variable(leaf):
            return leaf
        shape = _padded_shape(leaf, mesh)
        parts = [*spec(axes_of(leaf), shape, **_split_sizes(mesh))]
        parts += [None] * (leaf.ndim - len(parts))
        for index, size in enumerate(leaf.shape):
            if size != shape[index]:  # JAX does not constrain an axis to unequal parts
                parts[index] = PartitionSpec.UNCONSTRAINED
        return leaf.replace(jax.lax.with_sharding_constraint(leaf.get_value(), PartitionSpec(*parts)))

    return jax.tree.map(constrain, tree, is_leaf=_is_variable)


def row_sharding(mesh: Mesh, *, accumulated: bool) -> NamedSharding:
    """Rows split over data and fsdp, for [accumulation, microbatch, ...] or [microbatch, ...] arrays."""
    return NamedSharding(mesh, PartitionSpec(None, ROWS) if accumulated else PartitionSpec(ROWS))


def _padded_shape(leaf: nnx.Variable[Any], mesh: Any) -> tuple[int, ...]:
    tensor = mesh.shape["tensor"]
    sizes = zip(axes_of(leaf), leaf.shape, strict=True)
    return tuple(-(-size // tensor) * tensor if name in TENSOR_AXES else size for name, size in sizes)


def _split_sizes(mesh: Any) -> dict[str, int]:
    return {"fsdp": mesh.shape["fsdp"], "tensor": mesh.shape["tensor"]}


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)
