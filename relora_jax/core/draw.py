"""How A [in, r] is drawn, at the start and again at each restart.

If A is trained: U(-1/sqrt(in), 1/sqrt(in)), ReLoRA's. If it is frozen, as in RSO (arXiv 2502.07222):
N(0, 1/r), or orthogonal columns of about the same length, sqrt(in/r). A @ A.T is then I on average.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def uniform(
    key: Key[Array, ""], shape: tuple[int, int], dtype: Any, *, bound: float | None = None
) -> Float[Array, "m n"]:
    """U(-bound, bound), the bound being 1/sqrt(in) unless another is given."""
    bound = bound or 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def normal(key: Key[Array, ""], shape: tuple[int, int], dtype: Any) -> Float[Array, "in r"]:
    """N(0, 1/r)."""
    return jax.random.normal(key, shape, dtype) / math.sqrt(shape[1])


def orthonormal(key: Key[Array, ""], shape: tuple[int, int], dtype: Any) -> Float[Array, "in r"]:
    """sqrt(in/r) times orthonormal columns, drawn uniformly among all of these."""
    q, upper = jnp.linalg.qr(jax.random.normal(key, shape, jnp.promote_types(dtype, jnp.float32)))
    signs = jnp.where(jnp.diagonal(upper) < 0, -1, 1)  # else QR would prefer some
    return (math.sqrt(shape[0] / shape[1]) * q * signs[None]).astype(dtype)


TRAINED = "none"  # of the following: A is not frozen
Draw = Callable[[Any, tuple[int, int], Any], Any]  # of key, shape and dtype
DRAWS: dict[str, Draw] = {
    TRAINED: uniform,
    "normal": normal,
    "orthonormal": orthonormal,
}


def layers(draw: Draw, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A factor of shape [*layers, m, n], each layer drawn from a separate key.

    One after another: on a CPU, batched LAPACK calls can wait for each other for ever (training/ledger.py).
    """
    *stacked, m, n = shape
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(math.prod(stacked)))
    return jax.lax.map(lambda layer_key: draw(layer_key, (m, n), dtype), keys).reshape(shape)
