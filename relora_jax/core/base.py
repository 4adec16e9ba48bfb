"""Storage formats of the frozen base kernel W: each stores, reads, multiplies and merges it.

    float32     unchanged
    bfloat16    half the memory; merges are rounded stochastically, so that updates smaller than the
                spacing of bfloat16 survive in the mean
    float64     for reference computations; needs JAX's 64-bit types

W [*layers, in, out] is stored as a dict of arrays, which become variables of the layer: `kernel`, with the
shape of W, and optionally others named `kernel_...` with the same number of axes (size 1 where shared),
because layers are merged one at a time and variables are sharded by the names of their axes.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from relora_jax.core import grammar

Stored = dict[str, Any]  # {attribute of the layer: array}


class Base(grammar.Choice):
    """One storage format for W. To add one, subclass with `kind`, `store` and `read`, and add it to CHOICES.

    Override `round` as well if rounding to nearest would lose small merges.
    """

    def store(self, w: Float[Array, "*layers in out"]) -> Stored:
        """The arrays that represent W, rounded to nearest."""
        raise NotImplementedError

    def read(self, stored: Stored) -> Float[Array, "*layers in out"]:
        """W, reconstructed from its stored arrays."""
        raise NotImplementedError

    def multiply(
        self,
        x: Float[Array, "*tokens in"],
        stored: Stored,
        *,
        precision: Any = None,
        out_sharding: Any = None,
    ) -> Float[Array, "*tokens out"]:
        """x @ W for a single layer, in the dtype of x."""
        w = self.read(stored).astype(x.dtype)
        return jnp.matmul(x, w, precision=precision, out_sharding=out_sharding)

    def merge(self, stored: Stored, delta: Float[Array, "in out"], key: Any) -> Stored:
        """Stored form of W + delta for a single layer, summed in at least float32; `key` is for rounding."""
        w = self.read(stored)
        wide = jnp.promote_types(w.dtype, delta.dtype)
        return self.round(w.astype(wide) + delta.astype(wide), key)

    def round(self, w: Float[Array, "in out"], key: Any) -> Stored:
        """Stored form of the merged W of a single layer; rounds to nearest unless overridden."""
        return self.store(w)


class _Plain(Base):
    """A single array of a floating-point type."""

    def store(self, w: Float[Array, "*layers in out"]) -> Stored:
        """W cast to this dtype."""
        return {"kernel": w.astype(self.kind)}

    def read(self, stored: Stored) -> Float[Array, "*layers in out"]:
        """The array itself."""
        return stored["kernel"]


class Float32(_Plain):
    """W in float32."""

    kind: ClassVar[str] = "float32"


class Bfloat16(_Plain):
    """W in bfloat16; merges are unbiased."""

    kind: ClassVar[str] = "bfloat16"

    def round(self, w: Float[Array, "in out"], key: Any) -> Stored:
        """W rounded stochastically."""
        return {"kernel": round_stochastically(w, key)}


class Float64(_Plain):
    """W in float64."""

    kind: ClassVar[str] = "float64"

    def __post_init__(self) -> None:
        if jax.dtypes.canonicalize_dtype(self.kind) != self.kind:
            raise ValueError("base_dtype float64 needs jax_enable_x64: use float32 or bfloat16")


CHOICES: dict[str, type[Base]] = {choice.kind: choice for choice in (Float32, Bfloat16, Float64)}


def parse(base_dtype: Any) -> Base:
    """The `Base` for a name or a dtype; a `Base` is returned unchanged. ValueError if it is not valid."""
    if isinstance(base_dtype, Base):
        return base_dtype
    text = base_dtype if isinstance(base_dtype, str) else jnp.dtype(base_dtype).name
    return grammar.parse(text, CHOICES, name="base_dtype")


def round_stochastically(x: Any, key: Any) -> Any:
    """x rounded to one of its two bfloat16 neighbors, drawn so that the expected value is x.

    Rounding to nearest would discard every merge smaller than half the spacing.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
