"""W + scale * (A @ B): layer by layer in place, in at least float32 at highest precision.

How the sum is rounded is the base type's (base.py). Shapes: [*layers, in, out] W, [*layers, in, r] A,
[*layers, r, out] B.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from relora_jax.core.base import Base, Stored

HIGHEST = lax.Precision.HIGHEST


def delta(a: Any, b: Any, scale: float) -> Any:
    """scale * (A @ B), in at least float32 at highest precision."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return scale * jnp.matmul(a.astype(wide), b.astype(wide), precision=HIGHEST)


@partial(jax.jit, static_argnames=("base", "scale"))
def merge_layers(base: Base, w: Stored, a: Any, b: Any, scale: float, key: Any) -> tuple[Stored, Any]:
    """(merged W, new A), one layer at a time so that no second kernel is held.

    Jitted, so that restarts outside of a jitted function compile once per shape and not each time.
    """
    shapes, a_shape, bound = (
        {name: part.shape for name, part in w.items()},
        a.shape,
        1 / math.sqrt(a.shape[-2]),
    )
    w, a, b = jax.tree.map(lambda v: v.reshape(-1, *v.shape[-2:]), (w, a, b))

    def merge_layer(layer: Any, carry: Any) -> Any:
        w, a = carry
        draw, rounding = jax.random.split(jax.random.fold_in(key, layer))
        step = delta(a[layer], b[layer], scale)
        merged = base.merge({name: part[layer] for name, part in w.items()}, step, rounding)
        fresh = jax.random.uniform(draw, a.shape[1:], a.dtype, -bound, bound)
        return {name: part.at[layer].set(merged[name]) for name, part in w.items()}, a.at[layer].set(fresh)

    w, a = lax.fori_loop(0, a.shape[0], merge_layer, (w, a))
    return {name: part.reshape(shapes[name]) for name, part in w.items()}, a.reshape(a_shape)
