"""Storage formats of the frozen base kernel W: each stores, reads, multiplies and merges it.

    float32     unchanged
    bfloat16    half the memory; merges are rounded stochastically, so that updates smaller than the
                spacing of bfloat16 survive in the mean
    float64     for reference computations; needs JAX's 64-bit types
    int8        a scale for each output channel; the products with x, and with dy for dx, are 8-bit, too
    float8_e4m3 the same with a mantissa of 3 bits
    nf4         4 bits, and a scale for every 64 inputs of a channel (QLoRA, arXiv 2305.14314)

Scales are chosen when W is stored, and again at each merge. Everything below float32 is rounded to nearest
when W is stored, and stochastically at merges.

W [*layers, in, out] is stored as a dict of arrays, which become variables of the layer: `kernel`, with the
shape of W, and optionally others named `kernel_...` with the same number of axes (fewer entries where they
are shared), because layers are merged one at a time and variables are sharded by the names of their axes.
"""

from functools import partial
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

    def spacing(self, w: Float[Array, "*layers in out"]) -> Float[Array, "*layers in out"]:
        """How far apart two neighbors around each entry of a W that was read are: here, in its own dtype."""
        return jnp.finfo(w.dtype).eps * jnp.abs(w)


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


class _Scaled(Base):
    """W = values * scale, |values| <= `largest`: the values in few bits, a scale for each group of inputs."""

    largest: ClassVar[float]

    def store(self, w: Float[Array, "*layers in out"]) -> Stored:
        """W rounded to nearest."""
        return self._stored(w, self.nearest)

    def round(self, w: Float[Array, "in out"], key: Any) -> Stored:
        """W rounded stochastically."""
        noise = jax.random.uniform(key, w.shape)
        return self._stored(w, lambda values: self.rounded(values, noise))

    def read(self, stored: Stored) -> Float[Array, "*layers in out"]:
        """W in float32."""
        values = self.values(stored["kernel"])
        return values * self.spread(stored["kernel_scale"], values.shape[-2])

    def nearest(self, values: Float[Array, "*shape"]) -> Any:
        """The values as the kernel stores them, rounded to nearest."""
        return self.rounded(values, 0.5)

    def rounded(self, values: Float[Array, "*shape"], noise: Any) -> Any:
        """The same, rounded up if the distance from below, as a part of the spacing, plus noise reaches 1."""
        raise NotImplementedError

    def values(self, kernel: Any) -> Float[Array, "*layers in out"]:
        """The inverse of `rounded`."""
        return kernel.astype(jnp.float32)

    def magnitudes(self, w: Float[Array, "*layers in out"]) -> Float[Array, "*layers groups out"]:
        """The largest |W| of each group of inputs: all of them, unless overridden."""
        return jnp.max(jnp.abs(w), axis=-2, keepdims=True)

    def spread(
        self, scale: Float[Array, "*layers groups out"], fan_in: int
    ) -> Float[Array, "*layers #in out"]:
        """The scale of each input's group."""
        del fan_in
        return scale

    def spacing(self, w: Float[Array, "*layers in out"]) -> Float[Array, "*layers in out"]:
        """The distance of the two values around each entry, times its scale."""
        above, below = (self.read(self._stored(w, partial(self.rounded, noise=n))) for n in (1.0, 0.0))
        return above - below

    def _stored(self, w: Float[Array, "*layers in out"], rounded: Any) -> Stored:
        scale = _scale(self.magnitudes(w), self.largest)
        values = w.astype(scale.dtype) / self.spread(scale, w.shape[-2])
        return {"kernel": rounded(jnp.clip(values, -self.largest, self.largest)), "kernel_scale": scale}


class _EightBit(_Scaled):
    """Products of 8-bit values: x, and dy for dx, are rounded to nearest with a scale for each token.

    Chips that multiply 8-bit values do so at twice the rate of bfloat16; others give the same result.
    """

    def multiply(
        self,
        x: Float[Array, "*tokens in"],
        stored: Stored,
        *,
        precision: Any = None,
        out_sharding: Any = None,
    ) -> Float[Array, "*tokens out"]:
        """x @ W with both in 8 bits, in the dtype of x; `precision` is of no use here."""
        del precision
        return _eight_bit_product(x, stored, self, out_sharding)

    def sums(self, dtype: Any) -> Any:
        """The dtype in which a product in this dtype is summed, before it is multiplied by its scales."""
        return dtype

    @jax.named_scope("rounding")
    def dot(
        self, x: Float[Array, "*tokens k"], kernel: Any, *, axis: int, dtype: Any, out_sharding: Any = None
    ) -> Float[Array, "*tokens n"]:
        """x times the kernel's values, summed over this axis of the kernel."""
        scale = _scale(jnp.max(jnp.abs(x), axis=-1, keepdims=True), self.largest)
        values = self.nearest(jnp.clip(x.astype(scale.dtype) / scale, -self.largest, self.largest))
        y = lax.dot_general(
            values,
            _of_one_layer(kernel) if axis == 0 else kernel,
            (((x.ndim - 1,), (axis,)), ((), ())),
            preferred_element_type=self.sums(dtype),
            out_sharding=out_sharding,
        )
        return y.astype(scale.dtype) * scale


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _eight_bit_product(x: Any, stored: Stored, base: _EightBit, out_sharding: Any) -> Any:
    y = base.dot(x, stored["kernel"], axis=0, dtype=x.dtype, out_sharding=out_sharding)
    return (y * _per_output(stored, y.ndim)).astype(x.dtype)


def _eight_bit_forward(x: Any, stored: Stored, *options: Any) -> Any:
    return _eight_bit_product(x, stored, *options), stored


def _eight_bit_backward(base: _EightBit, _: Any, stored: Stored, dy: Any) -> Any:
    """dx = (dy * scale) @ kernel^T; W is frozen."""
    scaled = dy * _per_output(stored, dy.ndim)
    return base.dot(scaled, stored["kernel"], axis=1, dtype=dy.dtype).astype(dy.dtype), None


_eight_bit_product.defvjp(_eight_bit_forward, _eight_bit_backward)


def _of_one_layer(kernel: Any) -> Any:
    """The kernel [in, out], for a product over `in`, before which XLA for GPUs transposes it.

    It would do that to the kernels of all layers at once, before a scan over them, and keep the copies; of a
    flat array it has none. Not where devices have parts of the kernel: flat, it would have to be whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    on_gpu = mesh.abstract_device is not None and mesh.abstract_device.platform in ("gpu", "cuda")
    if not on_gpu or mesh.size > mesh.shape.get("data", 1):
        return kernel
    return lax.optimization_barrier(kernel.reshape(-1)).reshape(kernel.shape)


def _per_output(stored: Stored, ndim: int) -> Any:
    return lax.expand_dims(stored["kernel_scale"][0], range(ndim - 1))


class Int8(_EightBit):
    """W = kernel * kernel_scale, the kernel in -127 to 127."""

    kind: ClassVar[str] = "int8"
    largest: ClassVar[float] = 127

    def sums(self, dtype: Any) -> Any:
        """Integers, exactly."""
        return jnp.int32

    def rounded(self, values: Float[Array, "*shape"], noise: Any) -> Any:
        """The integer below values + noise."""
        return jnp.minimum(jnp.floor(values + noise), self.largest).astype(jnp.int8)


class Float8(_EightBit):
    """W = kernel * kernel_scale, the kernel in the float8 with 4 bits of exponent and 3 of mantissa."""

    kind: ClassVar[str] = "float8_e4m3"
    largest: ClassVar[float] = 448

    def nearest(self, values: Float[Array, "*shape"]) -> Any:
        """The nearest value of the type."""
        return values.astype(jnp.float8_e4m3fn)

    def rounded(self, values: Float[Array, "*shape"], noise: Any) -> Any:
        """In the spacing of the type, 2^-3 of the power of two at or below a value, and 2^-9 at least."""
        _, exponent = jnp.frexp(values)  # |values| in [2^(exponent - 1), 2^exponent)
        spacing = jnp.ldexp(jnp.ones_like(values), jnp.maximum(exponent - 1, -6) - 3)
        steps = jnp.floor(values / spacing + noise)
        return jnp.minimum(steps * spacing, self.largest).astype(jnp.float8_e4m3fn)


class Nf4(_Scaled):
    """W = QUANTILES[kernel] * kernel_scale, a scale for every 64 inputs; products are in the dtype of x."""

    kind: ClassVar[str] = "nf4"
    largest: ClassVar[float] = 1
    group: ClassVar[int] = 64

    def rounded(self, values: Float[Array, "*shape"], noise: Any) -> Any:
        """The index of one of the two quantiles around a value."""
        table = jnp.asarray(QUANTILES, values.dtype)
        last = len(QUANTILES) - 2
        below = jnp.minimum(sum((values >= quantile).astype(jnp.int32) for quantile in table[1:]), last)
        start, end = _select(below, table[:-1]), _select(below, table[1:])
        up = jnp.floor((values - start) / (end - start) + noise).astype(jnp.int32)
        return (below + jnp.minimum(up, 1) - 8).astype(jnp.int4)

    def values(self, kernel: Any) -> Float[Array, "*layers in out"]:
        """The quantile of each index."""
        return _select(kernel.astype(jnp.int32) + 8, jnp.asarray(QUANTILES, jnp.float32))

    def magnitudes(self, w: Float[Array, "*layers in out"]) -> Float[Array, "*layers groups out"]:
        """The largest |W| of every 64 inputs; the last group may have fewer."""
        *layers, fan_in, fan_out = w.shape
        groups = -(-fan_in // self.group)
        widths = [*((0, 0) for _ in layers), (0, groups * self.group - fan_in), (0, 0)]
        return jnp.max(jnp.abs(jnp.pad(w, widths).reshape(*layers, groups, self.group, fan_out)), axis=-2)

    def spread(
        self, scale: Float[Array, "*layers groups out"], fan_in: int
    ) -> Float[Array, "*layers in out"]:
        """Each scale 64 times."""
        return jnp.repeat(scale, self.group, axis=-2)[..., :fan_in, :]


# Of a normal distribution, as the published code of QLoRA has them: 7 below 0, 0 itself, and 8 above.
QUANTILES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


KINDS = (Float32, Bfloat16, Float64, Int8, Float8, Nf4)
CHOICES: dict[str, type[Base]] = {choice.kind: choice for choice in KINDS}


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


def _scale(magnitude: Any, largest: float) -> Any:
    """magnitude / largest in at least float32; 1 where the magnitude is 0."""
    wide = jnp.promote_types(magnitude.dtype, jnp.float32)
    return jnp.where(magnitude == 0, 1, magnitude.astype(wide) / largest).astype(wide)


def _select(index: Any, table: Any) -> Any:
    """table[index] by comparisons: faster than a lookup on accelerators, and fused with what follows."""
    return lax.select_n(index, *(jnp.broadcast_to(value, index.shape) for value in table))
