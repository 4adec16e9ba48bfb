"""How a frozen base kernel W is stored: a value that stores, reads, multiplies and merges it.

    float32     as it is
    bfloat16    half of the memory; merges are rounded stochastically, so that those smaller than its spacing
                are not lost in the mean
    float64     for oracles, where JAX has 64-bit types

W [*layers, in, out] is stored as a dict of arrays, which become variables of the layer: `kernel`, of W's
shape, and perhaps others, whose names begin with `kernel_` and which have as many axes (size 1 where they are
shared), since layers are merged one by one and variables are sharded by the names of their axes.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from relora_jax.core import grammar

Stored = dict[str, Any]  # {attribute of the layer: array}


class Base(grammar.Choice):
    """One way to store W. Another one is a class with `kind`, `store` and `read`, and a row in CHOICES.

    It overrides `round` as well where rounding to nearest would lose merges that are small.
    """

    def store(self, w: Float[Array, "*layers in out"]) -> Stored:
        """The arrays that W is stored as, rounded to nearest."""
        raise NotImplementedError

    def read(self, stored: Stored) -> Float[Array, "*layers in out"]:
        """W, as the arrays hold it."""
        raise NotImplementedError

    def multiply(
        self, x: Float[Array, "*tokens in"], stored: Stored, *, precision: Any = None
    ) -> Float[Array, "*tokens out"]:
        """x @ W in the type of x; of one layer."""
        return jnp.matmul(x, self.read(stored).astype(x.dtype), precision=precision)

    def merge(self, stored: Stored, delta: Float[Array, "in out"], key: Any) -> Stored:
        """W + delta of one layer, summed in at least float32, stored again; `key` may draw the rounding."""
        w = self.read(stored)
        wide = jnp.promote_types(w.dtype, delta.dtype)
        return self.round(w.astype(wide) + delta.astype(wide), key)

    def round(self, w: Float[Array, "in out"], key: Any) -> Stored:
        """The arrays that a merged W of one layer is stored as: rounded to nearest, unless overridden."""
        return self.store(w)


class _Plain(Base):
    """One array of a floating-point type."""

    def store(self, w: Float[Array, "*layers in out"]) -> Stored:
        """W in this type."""
        return {"kernel": w.astype(self.kind)}

    def read(self, stored: Stored) -> Float[Array, "*layers in out"]:
        """The array itself."""
        return stored["kernel"]


class Float32(_Plain):
    """W in float32."""

    kind: ClassVar[str] = "float32"


class Bfloat16(_Plain):
    """W in bfloat16; a merge is right in the mean."""

    kind: ClassVar[str] = "bfloat16"

    def round(self, w: Float[Array, "in out"], key: Any) -> Stored:
        """Rounded stochastically."""
        return {"kernel": round_stochastically(w, key)}


class Float64(_Plain):
    """W in float64."""

    kind: ClassVar[str] = "float64"

    def __post_init__(self) -> None:
        if jax.dtypes.canonicalize_dtype(self.kind) != self.kind:
            raise ValueError("base_dtype float64 needs jax_enable_x64: use float32 or bfloat16")


CHOICES: dict[str, type[Base]] = {choice.kind: choice for choice in (Float32, Bfloat16, Float64)}


def parse(base_dtype: Any) -> Base:
    """The choice itself, or the one that a text or a dtype names. ValueError with the grammar otherwise."""
    if isinstance(base_dtype, Base):
        return base_dtype
    text = base_dtype if isinstance(base_dtype, str) else jnp.dtype(base_dtype).name
    return grammar.parse(text, CHOICES, what="base_dtype")


def round_stochastically(x: Any, key: Any) -> Any:
    """x in bfloat16, one of its two neighbours, drawn so that the mean is x.

    To nearest, merges smaller than the spacing would be lost; here they are right in the mean.
    """
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
