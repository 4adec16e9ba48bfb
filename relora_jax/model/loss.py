"""Cross-entropy loss in nats over the counted targets. Shapes: B rows, L positions, V vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def counted_targets(ids: Any, lengths: Any, segment_ids: Any = None) -> Any:
    """Mask [*batch, L] of the targets ids[..., 1:] that count: those within the true length of their row.

    With `segment_ids`, a target must also be in the same document as the id before it: the first id of a
    document is not predicted from an EOS. JAX or NumPy arrays: ids [*batch, L+1] and lengths [*batch].
    """
    index = np.expand_dims(np.arange(ids.shape[-1] - 1), tuple(range(lengths.ndim)))
    counted = index < lengths[..., None] - 1
    if segment_ids is not None:
        counted &= segment_ids[..., 1:] == segment_ids[..., :-1]
    return counted


def token_loss(
    logits: Float[Array, "B L V"],
    ids: Int[Array, "B L+1"],
    lengths: Int[Array, " B"],
    segment_ids: Int[Array, "B L+1"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(summed nats, number) of the counted targets ids[:, 1:], as `counted_targets` defines them."""
    targets, counted = ids[:, 1:], counted_targets(ids, lengths, segment_ids)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted, dtype=jnp.int32)
