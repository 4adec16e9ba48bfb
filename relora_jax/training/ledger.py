"""What a restart did: whether the function changed, what was merged, and which moments were cleared.

Computed before and after a restart, from the state and a few held-out rows. The spaces of what was merged are
those of one layer of each kind, the middle one. Shapes: A [layers, in, r], B [layers, r, out].
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relora_jax.core import base, low_rank, reset
from relora_jax.core.merge import HIGHEST
from relora_jax.data.batches import Batch
from relora_jax.model.llama import Llama

LONGEST = 128  # positions of a held-out row: each has as many logits as the vocabulary has pieces
_matmul = partial(jnp.matmul, precision=HIGHEST)
Spaces = dict[str, np.ndarray]  # {"KIND in" or "KIND out": orthonormal columns [side, r]}


class Facts(NamedTuple):
    """Of one state; after a restart, when nothing is to be merged, the first and the last alone."""

    logits: Any  # [rows, L, V] of the held-out rows
    squared_norms: Any  # [kernels] of scale * (A @ B), all layers
    effective_ranks: Any  # [kernels, layers]: exp of the entropy of the normalized singular values
    spaces: dict[str, Any]  # of scale * (A @ B), see Spaces
    moments: Any  # first moments of the factors that are not 0


def facts(model: Llama, opt_state: Any, batch: Batch, *, rows: int, after: bool) -> Facts:
    """The facts of a low-rank state, with the first `rows` rows of the batch, and not all of their length."""
    length = min(batch.ids.shape[1] - 1, LONGEST)
    segments = None if batch.segment_ids is None else batch.segment_ids[:rows, :length]
    logits = model(batch.ids[:rows, :length], segments)
    moments = reset.live_moments(opt_state)
    if after:
        return Facts(logits, (), (), {}, moments)
    norms, ranks, spaces = [], [], {}
    for path, dense in low_rank.low_rank_layers(model):
        values, of_in, of_out = jax.vmap(_singular)(dense.lora_a[...], dense.lora_b[...])
        values = dense.scale * values
        norms.append(jnp.sum(jnp.square(values)))
        ranks.append(effective_rank(values))
        middle = of_in.shape[0] // 2
        spaces |= {f"{path[-1]} in": of_in[middle], f"{path[-1]} out": of_out[middle]}
    return Facts(logits, jnp.stack(norms), jnp.stack(ranks), spaces, moments)


def effective_rank(values: Any) -> Any:
    """exp(-sum(p log p)) with p = values / sum(values), over the last axis; 0 where all are 0 (Roy, 2007)."""
    total = jnp.sum(values, axis=-1, keepdims=True)
    p = values / jnp.where(total > 0, total, 1)
    entropy = -jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0), axis=-1)
    return jnp.where(total[..., 0] > 0, jnp.exp(entropy), 0)


def row(config: Any, before: Facts, after: Facts, *, reset_due: bool) -> dict[str, Any]:
    """The fields of a restart's row of metrics, as arrays; without those of the spaces."""
    kind = base.parse(config.relora.base_dtype)
    one = kind.read(kind.store(jnp.ones((1, 1), jnp.float32)))
    cleared = 1 - after.moments / jnp.maximum(before.moments, 1)
    return {
        "logits_change": jnp.max(jnp.abs(after.logits - before.logits)),
        "logits_rms": jnp.sqrt(jnp.mean(jnp.square(before.logits))),
        "base_rounding": jnp.max(kind.spacing(one)),
        "moments_cleared": cleared if reset_due else None,
        "delta_norm": jnp.sqrt(jnp.sum(before.squared_norms)),
        "effective_rank": jnp.mean(before.effective_ranks),
    }


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


def _singular(a: Any, b: Any) -> tuple[Any, Any, Any]:
    """(singular values of A @ B, orthonormal bases of its columns [in, r] and of its rows [out, r])."""
    qa, ra = jnp.linalg.qr(a.astype(jnp.float32))
    qb, rb = jnp.linalg.qr(b.astype(jnp.float32).T)
    u, values, vt = jnp.linalg.svd(_matmul(ra, rb.T), full_matrices=False)
    return values, _matmul(qa, u), _matmul(qb, vt.T)
