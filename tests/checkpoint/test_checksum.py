"""The checksum depends on every bit and on the order of the elements, but not on the sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from relora_jax.checkpoint import checksum as module
from relora_jax.checkpoint.checksum import checksum_on_host, checksums
from tests.support import small

TYPES = ("float32", "bfloat16", "int32", "uint32", "bool", "int8")


def checksum(array: object) -> int:
    return int(checksums({"array": jnp.asarray(array)})["array"])


def random_array(dtype: str, shape: tuple[int, ...] = (16, 24)) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2**16, shape)
    return np.asarray(jnp.asarray(bits % 2 if dtype == "bool" else bits % 100).astype(dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_checksum_changes_with_any_bit(dtype: str) -> None:
    array = random_array(dtype)
    original, width = checksum(array), 1 if dtype == "bool" else 8 * array.dtype.itemsize
    flat = array.ravel().view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    for position in (0, 1, 23, 24, 200, 383):
        for bit in range(width):
            other = flat.copy()
            other[position] ^= flat.dtype.type(1 << bit)
            assert checksum(other.view(array.dtype).reshape(array.shape)) != original


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 383), min_size=2, max_size=2, unique=True))
def test_checksum_changes_if_two_elements_are_swapped(positions: list[int]) -> None:
    array = np.arange(384, dtype=np.float32).reshape(16, 24)
    other = array.copy().ravel()
    other[positions] = other[positions[::-1]]
    assert checksum(other.reshape(16, 24)) != checksum(array)


def test_checksum_depends_on_the_number_of_zeros_and_the_order_of_rows() -> None:
    assert checksum(np.zeros(7)) != checksum(np.zeros(8))
    array = random_array("float32")
    assert checksum(np.roll(array, 1, axis=0)) != checksum(array)


def test_checksum_does_not_depend_on_the_sharding() -> None:
    array = random_array("float32")
    mesh = small.mesh(2, 2)
    for spec in (
        PartitionSpec(),
        PartitionSpec("fsdp"),
        PartitionSpec(None, "fsdp"),
        PartitionSpec("data", "fsdp"),
    ):
        assert checksum(jax.device_put(array, NamedSharding(mesh, spec))) == checksum(array)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (16, 24), (3, 5, 7)], ids=str)
def test_checksum_on_the_host_is_the_same(
    dtype: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    array = random_array(dtype, shape)
    for block_words in (module.BLOCK_WORDS, 100):
        monkeypatch.setattr(module, "BLOCK_WORDS", block_words)
        assert checksum_on_host(array) == checksum(array)
        assert checksum_on_host(array.T) == checksum(array.T)


def test_checksum_is_the_documented_function() -> None:
    """Checkpoints are read on other devices and by later versions."""
    assert checksum(np.arange(6, dtype=np.float32).reshape(2, 3)) == EXPECTED


def _mixed(word: int, index: int) -> int:
    word ^= index * 0x9E3779B9 % 2**32
    word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
    word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
    return word ^ word >> 16


EXPECTED = (
    sum(_mixed(int(word), i) for i, word in enumerate(np.arange(6, dtype=np.float32).view(np.uint32))) % 2**32
)
