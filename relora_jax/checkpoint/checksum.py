"""A checksum of an array's bits, computed where the array is and independent of its sharding.

Each element's bits are mixed with its flat index by a bijection of 32-bit words, and the results are summed
modulo 2^32: one changed word always changes the sum, several with probability 1 - 2^-32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

BLOCK_WORDS = 2**18  # of which NumPy makes a few copies, in the processor's cache


@jax.jit
def checksums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The checksum of each array, as uint32 scalars."""
    return {name: _checksum(array) for name, array in arrays.items()}


def checksum_on_host(array: np.ndarray) -> int:
    """The same checksum of an array in host memory, with NumPy alone: devices may be full."""
    array = array.astype(np.int8) if array.dtype == jnp.int4 else array  # 4 bits are in a byte of their own
    flat = np.ascontiguousarray(array).reshape(-1)
    words = flat.view({1: np.uint8, 2: np.uint16}.get(flat.itemsize, np.uint32))
    total = 0
    for start in range(0, len(words), BLOCK_WORDS):
        bits = words[start : start + BLOCK_WORDS].astype(np.uint32)
        index = np.arange(start, start + len(bits)).astype(np.uint32)  # modulo 2^32
        total += int(_mix(bits, index).sum(dtype=np.uint32))
    return total % 2**32


def _checksum(array: jax.Array) -> jax.Array:
    bits = _bits(array)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size % 2**32) + lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(_mix(bits, index), dtype=jnp.uint32)


def _mix(bits: Any, index: Any) -> Any:
    """A bijection of each uint32, for each index; of NumPy's or JAX's arrays."""
    mixed = bits ^ (index * np.uint32(0x9E3779B9))
    mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
    mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
    return mixed ^ (mixed >> 16)


def _bits(array: jax.Array) -> jax.Array:
    """The bits as uint32; a 64-bit element becomes two."""
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    if array.dtype == jnp.int4:
        array = array.astype(jnp.int8)
    dtype = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return lax.bitcast_convert_type(array, dtype).astype(jnp.uint32)
