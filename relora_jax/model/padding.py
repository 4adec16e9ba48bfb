"""Sides of matrix products, padded with zeros where they are computed: n columns become `side(n)`.

Tensor cores read kernels and activations in aligned pieces of 16 bytes, which rows of 5,461 numbers do not
have. What is stored, drawn, counted, saved or exported has no padding, and its gradients are cut.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from relora_jax.core.paths import is_variable

ALIGNED, TILE = 8, 128  # numbers


def side(size: int, dtype: Any) -> int:
    """The size of an axis in products: the next multiple of TILE in 16 bits, unless it is one of ALIGNED.

    Unchanged in wider types, and on a mesh whose axis `tensor` splits it: each device has a part of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_split = "tensor" in mesh.axis_names and mesh.shape["tensor"] > 1
    if jnp.dtype(dtype).itemsize > 2 or size % ALIGNED == 0 or is_split:
        return size
    return -(-size // TILE) * TILE


def padded(layer: Any, name: str, size: int, dtype: Any) -> Any:
    """The state of one layer, with the axes `name` of its variables padded from `size`; those of 1 stay.

    Unchanged if such an axis has another size, as a packed kernel may.
    """
    to = side(size, dtype)
    variables = jax.tree.leaves(layer, is_leaf=is_variable)
    sizes = {length for leaf in variables for axis, length in _axes(leaf) if axis == name}
    if to == size or not sizes <= {1, size}:
        return layer

    def pad(leaf: Any) -> Any:
        widths = [(0, to - size if (axis, length) == (name, size) else 0) for axis, length in _axes(leaf)]
        return leaf.replace(jnp.pad(leaf.get_value(), widths)) if any(map(sum, widths)) else leaf

    return jax.tree.map(pad, layer, is_leaf=is_variable)


def _axes(leaf: nnx.Variable[Any]) -> list[tuple[str, int]]:
    """(name, size) of each axis; within a scan, a variable no longer has the first ones that it names."""
    shape = jnp.shape(leaf.get_value())
    names = getattr(leaf, "axes", ())[-len(shape) :] if shape else ()
    return list(zip(names, shape, strict=False))
