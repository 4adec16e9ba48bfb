"""The loss of a row: nats of the targets that count. Shapes: B rows, L positions, V vocabulary."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def counted_targets(ids: Any, lengths: Any, segment_ids: Any = None) -> Any:
    """Which targets ids[..., 1:] count [*batch, L]: those that lie within their row's true length.

    With `segment_ids`, of those in the document of the id that they follow: none is guessed from an EOS.
    Arrays of JAX or NumPy, [*batch, L+1] and lengths [*batch].
    """
    places = np.expand_dims(np.arange(ids.shape[-1] - 1), tuple(range(lengths.ndim)))
    counted = places < lengths[..., None] - 1
    if segment_ids is not None:
        counted &= segment_ids[..., 1:] == segment_ids[..., :-1]
    return counted


def token_loss(
    logits: Float[Array, "B L V"],
    ids: Int[Array, "B L+1"],
    lengths: Int[Array, " B"],
    segment_ids: Int[Array, "B L+1"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(summed nats, number) of the targets ids[:, 1:] that count, as `counted_targets` has it."""
    targets, counted = ids[:, 1:], counted_targets(ids, lengths, segment_ids)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted, dtype=jnp.int32)
