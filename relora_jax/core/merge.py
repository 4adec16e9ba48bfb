"""W + scale * (A @ B): layer by layer, in place, in at least float32 at highest precision.

The base type (base.py) decides how the sum is rounded. Shapes: W [*layers, in, out], A [*layers, in, r],
B [*layers, r, out].
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
    """(merged W, new A), computed one layer at a time to avoid a second copy of the kernel.

    Jitted so that restarts outside of a jitted function compile once per shape instead of every time.
    """
    w_shapes, a_shape = {name: part.shape for name, part in w.items()}, a.shape
    bound = 1 / math.sqrt(a.shape[-2])
    w, a, b = jax.tree.map(lambda v: v.reshape(-1, *v.shape[-2:]), (w, a, b))

    def merge_layer(layer: Any, carry: Any) -> Any:
        w, a = carry
        draw_key, rounding_key = jax.random.split(jax.random.fold_in(key, layer))
        step = delta(a[layer], b[layer], scale)
        merged = base.merge({name: part[layer] for name, part in w.items()}, step, rounding_key)
        fresh = jax.random.uniform(draw_key, a.shape[1:], a.dtype, -bound, bound)
        return {name: part.at[layer].set(merged[name]) for name, part in w.items()}, a.at[layer].set(fresh)

    w, a = lax.fori_loop(0, a.shape[0], merge_layer, (w, a))
    return {name: part.reshape(w_shapes[name]) for name, part in w.items()}, a.reshape(a_shape)
