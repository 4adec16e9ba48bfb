"""A checksum of an array's bits, computed where the array lies: the same over every sharding.

Each element's bits are mixed with its place by a bijection of 32-bit words and the results are summed
modulo 2^32: any one changed word changes the sum, several at once with probability 1 - 2^-32.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.jit
def checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The checksum of each array, as uint32 scalars."""
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: jax.Array) -> jax.Array:
    words = _words(array)
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    mixed = words ^ (place * jnp.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)


def _words(array: jax.Array) -> jax.Array:
    """The bits as uint32, of a 64-bit element as two of them."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    kind = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, kind).astype(jnp.uint32)
