"""The loss of a row: nats of the targets that count. Shapes: B rows, L positions, V vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_loss(
    logits: Float[Array, "B L V"],
    ids: Int[Array, "B L+1"],
    lengths: Int[Array, " B"],
    documents: Int[Array, "B L+1"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(summed nats, number) of the targets ids[:, 1:] that lie within their row's true length.

    With `documents`, of those in the document of the id that they follow: none is guessed from an EOS.
    """
    targets = ids[:, 1:]
    counted = jnp.arange(targets.shape[1])[None] < lengths[:, None] - 1
    if documents is not None:
        counted &= documents[:, 1:] == documents[:, :-1]
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    return jnp.sum(jnp.where(counted, nats, 0)), jnp.sum(counted, dtype=jnp.int32)
