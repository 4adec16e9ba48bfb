"""W + scale * (A @ B): layer by layer, in place, in at least float32 at highest precision.

The base type (base.py) decides how the sum is rounded; a master, W in at least float32, is not rounded.
Shapes: W [*layers, in, out], A [*layers, in, r], B [*layers, r, out].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from relora_jax.core import draw
from relora_jax.core.base import Base, Stored

HIGHEST = lax.Precision.HIGHEST
_DEVICE = jax.memory.Space.Device


def delta(a: Any, b: Any, scale: float) -> Any:
    """scale * (A @ B), in at least float32 at highest precision."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return scale * jnp.matmul(a.astype(wide), b.astype(wide), precision=HIGHEST)


@partial(jax.jit, static_argnames=("base", "scale", "frozen_a"))
def merge_layers(
    base: Base,
    w: Stored,
    a: Any,
    b: Any,
    scale: float,
    key: Any,
    master: Any = None,
    frozen_a: str = draw.TRAINED,
) -> tuple[Stored, Any, Any]:
    """(merged W, new A, merged master), computed one layer at a time to avoid a second copy of the kernel.

    The master may be in the memory of the host: its layers are on the device one at a time.
    Jitted so that restarts outside of a jitted function compile once per shape instead of every time.
    """
    w_shapes, a_shape = {name: part.shape for name, part in w.items()}, a.shape
    master_shape = None if master is None else master.shape
    w, a, b, master = jax.tree.map(lambda v: v.reshape(-1, *v.shape[-2:]), (w, a, b, master))

    def merge_layer(layer: Any, carry: Any) -> Any:
        w, a, master = carry
        draw_key, rounding_key = jax.random.split(jax.random.fold_in(key, layer))
        step = delta(a[layer], b[layer], scale)
        if master is None:
            merged = base.merge({name: part[layer] for name, part in w.items()}, step, rounding_key)
        else:
            exact = jax.device_put(lax.dynamic_index_in_dim(master, layer, keepdims=False), _DEVICE) + step
            merged = base.store(exact)
            exact = jax.device_put(exact, jax.typeof(master).memory_space)
            master = lax.dynamic_update_index_in_dim(master, exact, layer, axis=0)
        fresh = draw.DRAWS[frozen_a](draw_key, a.shape[1:], a.dtype)
        w = {name: part.at[layer].set(merged[name]) for name, part in w.items()}
        return w, a.at[layer].set(fresh), master

    w, a, master = lax.fori_loop(0, a.shape[0], merge_layer, (w, a, master))
    w = {name: part.reshape(w_shapes[name]) for name, part in w.items()}
    return w, a.reshape(a_shape), None if master is None else master.reshape(master_shape)
