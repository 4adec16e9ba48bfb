"""A checksum of an array's bits, computed on its devices and independent of its sharding.

Each element's bits are mixed with its flat index by a bijection of 32-bit words, and the results are summed
modulo 2^32: one changed word always changes the sum, several with probability 1 - 2^-32.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.jit
def checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The checksum of each array, as uint32 scalars."""
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    bits = _bits(array)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    mixed = bits ^ (index * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _bits(array: jax.Array) -> jax.Array:
    """The bits as uint32; a 64-bit element becomes two."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    dtype = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, dtype).astype(jnp.uint32)
