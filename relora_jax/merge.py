"""W + scale A B: layer by layer in place, in at least float32 at highest precision.

Into a bfloat16 kernel the sum is rounded stochastically: merges smaller than its spacing would be lost
to the nearest, here they are right in the mean. Shapes: [*layers, in, out] W, [*layers, in, r] A.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

HIGHEST = lax.Precision.HIGHEST


def delta(a: Any, b: Any, scale: float) -> Any:
    """Scale A B, in at least float32 at highest precision."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    return scale * jnp.matmul(a.astype(wide), b.astype(wide), precision=HIGHEST)


@partial(jax.jit, static_argnames="scale")
def merge_layers(w: Any, a: Any, b: Any, scale: float, key: Any) -> tuple[Any, Any]:
    """(merged W, new A), one layer at a time so that no second kernel is held.

    Jitted, so that restarts outside of a jitted function compile once per shape and not each time.
    """
    w_shape, a_shape, bound = w.shape, a.shape, 1 / math.sqrt(a.shape[-2])
    w, a, b = (v.reshape(-1, *v.shape[-2:]) for v in (w, a, b))

    def merge_layer(layer: Any, carry: Any) -> Any:
        w, a = carry
        draw, rounding = jax.random.split(jax.random.fold_in(key, layer))
        step = delta(a[layer], b[layer], scale)
        wide = jnp.promote_types(w.dtype, step.dtype)
        merged = round_to(w[layer].astype(wide) + step.astype(wide), w.dtype, rounding)
        fresh = jax.random.uniform(draw, a.shape[1:], a.dtype, -bound, bound)
        return w.at[layer].set(merged), a.at[layer].set(fresh)

    w, a = lax.fori_loop(0, w.shape[0], merge_layer, (w, a))
    return w.reshape(w_shape), a.reshape(a_shape)


def round_to(x: Any, dtype: Any, key: Any) -> Any:
    """X in `dtype`: bfloat16 by stochastic rounding (the mean is x), wider types as they are."""
    if dtype != jnp.bfloat16:
        return x.astype(dtype)
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
