"""What a restart did: whether the function changed, what was merged, and which moments were cleared.

The devices compute products alone, and NumPy the singular values of their small results: on a CPU, batched
LAPACK calls of JAX wait for threads of the pool that they run on, so that two of them may wait for ever.
Shapes: A [layers, in, r], B [layers, r, out].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from relora_jax.core import base, low_rank, reset
from relora_jax.core.merge import HIGHEST
from relora_jax.data.batches import Batch
from relora_jax.model.llama import Llama

LONGEST = 128  # positions of a held-out row: each has as many logits as the vocabulary has pieces
LEAST = 1e-3  # of the largest singular value: smaller ones are lost in the rounding of A.T @ A in float32
Spaces = dict[str, np.ndarray]  # {"KIND in" or "KIND out": orthonormal columns [side, r]}


class Factors(NamedTuple):
    """Of one kind of kernel: what describes scale * (A @ B) of every layer, and the factors of one layer."""

    scale: Any
    a_gram: Any  # A.T @ A [layers, r, r]
    b_gram: Any  # B @ B.T [layers, r, r]
    a: Any  # [in, r] of the middle layer
    b: Any  # [r, out]


class Facts(NamedTuple):
    """Of one state."""

    logits: Any  # [rows, L, V] of the held-out rows
    moments: Any  # how many first moments of the factors are not 0
    factors: dict[str, Any]  # {kind: Factors}; empty after a restart, when there is nothing to merge


def facts(model: Llama, opt_state: Any, batch: Batch, *, rows: int, after: bool) -> Facts:
    """The facts of a low-rank state, with the first `rows` rows of the batch, and not all of their length."""
    length = min(batch.ids.shape[1] - 1, LONGEST)
    segments = None if batch.segment_ids is None else batch.segment_ids[:rows, :length]
    logits, product = model(batch.ids[:rows, :length], segments), partial(jnp.einsum, precision=HIGHEST)
    factors = {}
    for path, dense in low_rank.low_rank_layers(model) if not after else ():
        a, b = (factor[...].astype(jnp.float32) for factor in (dense.lora_a, dense.lora_b))
        grams = product("lir,lis->lrs", a, a), product("lro,lso->lrs", b, b)
        middle = a.shape[0] // 2
        factors[path[-1]] = Factors(jnp.float32(dense.scale), *grams, a[middle], b[middle])
    return Facts(logits, reset.live_moments(opt_state), factors)


def changes(before: Facts, after: Facts) -> dict[str, jax.Array]:
    """The fields of a restart's row that compare the two states."""
    cleared = jnp.where(before.moments > 0, 1 - after.moments / before.moments, jnp.nan)
    return {
        "logits_change": jnp.max(jnp.abs(after.logits - before.logits)),
        "logits_rms": jnp.sqrt(jnp.mean(jnp.square(before.logits))),
        "moments_cleared": cleared,
    }


def base_rounding(base_dtype: str) -> float:
    """The spacing of the values of a base type at 1."""
    kind = base.parse(base_dtype)
    return float(np.max(kind.spacing(kind.read(kind.store(jnp.ones((1, 1), jnp.float32))))))


def merged(factors: dict[str, Factors]) -> dict[str, float]:
    """The fields of a restart's row about what was merged: its norm and its mean effective rank."""
    values = {kind: f.scale * _singular_values(f.a_gram, f.b_gram) for kind, f in factors.items()}
    norm = np.sqrt(sum(np.sum(np.square(v)) for v in values.values()))
    rank = np.mean([effective_rank(v) for v in values.values()])
    return {"delta_norm": float(norm), "effective_rank": float(rank)}


def effective_rank(values: Float[np.ndarray, "layers side"]) -> float:
    """exp(-sum(p log p)) with p = values / sum(values), the mean over layers; 0 where all are 0."""
    total = np.sum(values, axis=-1, keepdims=True)
    p = values / np.where(total > 0, total, 1)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    return float(np.mean(np.where(total[..., 0] > 0, np.exp(entropy), 0)))


def spaces(factors: dict[str, Factors]) -> Spaces:
    """Orthonormal bases of the columns and of the rows of A @ B, of the middle layer of each kind."""
    sides = {f"{kind} in": f.a for kind, f in factors.items()}
    sides |= {f"{kind} out": f.b.T for kind, f in factors.items()}
    return {name: np.linalg.qr(side)[0] for name, side in sides.items()}


def overlaps(spaces: Spaces, earlier: Spaces | None) -> dict[str, float | None]:
    """{side: share of the space of the factors' product, on this side, that lies in the earlier one}.

    The mean over the kinds of kernels; by chance it is r / side. None without earlier spaces.
    """
    result: dict[str, float | None] = {}
    for side in ("in", "out"):
        names = [name for name in spaces if name.endswith(f" {side}")]
        result[f"overlap_{side}"] = None
        if earlier is not None:
            inside = [np.sum(np.square(earlier[name].T @ spaces[name])) for name in names]
            result[f"overlap_{side}"] = float(np.mean(inside)) / spaces[names[0]].shape[1]
    return result


def _singular_values(a_gram: np.ndarray, b_gram: np.ndarray) -> np.ndarray:
    """Of A @ B [layers, r]: the roots of the eigenvalues of S (B B^T) S with S^2 = A^T A."""
    sizes, vectors = np.linalg.eigh(np.asarray(a_gram, np.float64))
    root = vectors * np.sqrt(np.maximum(sizes, 0))[:, None] @ vectors.transpose(0, 2, 1)
    squares = np.linalg.eigvalsh(root @ np.asarray(b_gram, np.float64) @ root)
    values = np.sqrt(np.maximum(squares, 0))
    return np.where(values > LEAST * values.max(axis=-1, keepdims=True), values, 0)
