"""x @ W + scale * (x @ A) @ B in two forms, neither of which computes the gradient of W (as large as W).

W is in its stored form (base.py). Shapes: `in`, `out` sides of the kernel; `r` rank.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from relora_jax.core.base import Base, Stored

FORMS = ("separate", "fused")
# the name, for policies of jax.checkpoint, of what products with kernels and factors give
PRODUCT = "product"


def check(form: str, dropout: float) -> None:
    """Raises ValueError for an unknown form, or a dropout that is out of range or unsupported by the form."""
    if form not in FORMS:
        raise ValueError(f"product {form!r} is not valid: use {' or '.join(FORMS)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must be in [0, 1)")
    if form == "fused" and dropout > 0:
        raise ValueError(f"product fused does not support dropout {dropout}: use separate")


def product(
    x: Float[Array, "*tokens in"],
    base: Base,
    w: Stored,
    a: Float[Array, "in r"],
    b: Float[Array, "r out"],
    *,
    scale: float,
    form: str,
    frozen_a: bool = False,
    dropout: float = 0.0,
    key: Any = None,
    precision: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "*tokens out"]:
    """x @ W + scale * (x @ A) @ B in the dtype of x; "fused" computes x @ (W + scale * A @ B).

    The fused form has a single product over the tokens; its kernel is summed in at least float32, of W and of
    the delta in the dtype of x. Neither form computes a gradient of W, nor of a frozen A: the backward pass
    then needs x @ A [tokens, r] and not x.
    """
    if form == "fused":
        return _fused(x, w, a, b, base, scale, frozen_a, precision, out_sharding)
    a = lax.stop_gradient(a) if frozen_a else a
    a, b = (v.astype(x.dtype) for v in (a, b))
    branch = x
    if key is not None and dropout > 0:
        with jax.named_scope("dropout"):
            branch = jnp.where(kept(key, x.shape, dropout), x / (1 - dropout), jnp.zeros_like(x))
    dot = partial(jnp.matmul, precision=precision)
    inner = checkpoint_name(dot(branch, a), PRODUCT)
    low_rank = scale * dot(inner, b, out_sharding=out_sharding)
    return base.multiply(x, w, precision=precision, out_sharding=out_sharding) + low_rank


def kept(key: Any, shape: tuple[int, ...], dropout: float) -> Bool[Array, "*shape"]:
    """A mask in which each entry is False with the probability `dropout`; columns of padding change no entry.

    Its bits are those of its token plus those of its column, hashed (lowbias32, Chris Wellons, 2018): 10
    integer operations, where random bits of its own take threefry 80.
    """
    of_tokens, of_columns = jax.random.split(key)
    tokens = jax.random.bits(of_tokens, (*shape[:-1], 1), jnp.uint32)
    columns = jax.random.bits(of_columns, (1,) * (len(shape) - 1) + shape[-1:], jnp.uint32)
    bits = tokens + columns
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return (bits ^ (bits >> 16)) >= jnp.uint32(min(round(dropout * 2**32), 2**32 - 1))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7, 8))
def _fused(x: Any, w: Any, a: Any, b: Any, *options: Any) -> Any:
    """x @ (W + scale * A @ B); its backward pass never forms x^T dy, which is as large as W."""
    base, scale, _, precision, out_sharding = options
    kernel = _fused_kernel(x.dtype, w, a, b, base, scale, precision)
    return jnp.matmul(x, kernel, precision=precision, out_sharding=out_sharding)


@jax.named_scope("fused")
def _fused_kernel(dtype: Any, w: Any, a: Any, b: Any, base: Base, scale: float, precision: Any) -> Any:
    """W + scale * A @ B, rounded to `dtype`; before the sum, only the delta, which is as large as W."""
    wide = jnp.promote_types(dtype, jnp.float32)
    delta = jnp.matmul(a.astype(dtype), b.astype(dtype), precision=precision)
    return (base.read(w).astype(wide) + scale * delta.astype(wide)).astype(dtype)


def _fused_forward(x: Any, w: Any, a: Any, b: Any, *options: Any) -> Any:
    y, (_, _, frozen_a, precision, _) = _fused(x, w, a, b, *options), options
    if frozen_a:
        x = checkpoint_name(jnp.matmul(x, a.astype(x.dtype), precision=precision), PRODUCT)
    return y, (x, w, a, b)


def _fused_backward(
    base: Base, scale: float, frozen_a: bool, precision: Any, _: Any, residuals: Any, dy: Any
) -> Any:
    """dx = dy W'^T with W' = W + scale A B; dA = scale x^T (dy B^T); dB = scale (x A)^T dy; W is frozen."""
    saved, w, a, b = residuals  # x, or x A if A is frozen
    dot = partial(jnp.matmul, precision=precision)
    dx = dot(dy, _fused_kernel(saved.dtype, w, a, b, base, scale, precision).T)
    saved, dy = saved.reshape(-1, saved.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if frozen_a:
        return dx, None, None, (scale * dot(saved.T, dy)).astype(b.dtype)
    da = scale * dot(saved.T, dot(dy, b.T.astype(dy.dtype)))
    db = scale * dot(dot(saved, a.astype(saved.dtype)).T, dy)
    return dx, None, da.astype(a.dtype), db.astype(b.dtype)


_fused.defvjp(_fused_forward, _fused_backward)
