"""Cross-entropy loss in nats over the counted targets, from the last hidden states.

Shapes: B rows, L positions, D hidden, V vocabulary.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from relora_jax.model import padding
from relora_jax.model.rows import ROWS, shared_by_devices

CHUNK = 1024  # targets whose logits exist at once on one device


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


@jax.named_scope("loss")
def token_loss(
    x: Float[Array, "B L D"],
    kernel: Float[Array, "D V"],
    ids: Int[Array, "B L+1"],
    lengths: Int[Array, " B"],
    segment_ids: Int[Array, "B L+1"] | None = None,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(summed nats, number) of the counted targets ids[:, 1:], predicted by the logits x @ kernel.

    `counted_targets` defines which count. Only the logits of CHUNK targets exist at once. Their gradient,
    softmax(logits) - [target], is computed with them, in the dtype of x for its products with x and kernel;
    both products are summed in at least float32.
    """
    counted = counted_targets(ids, lengths, segment_ids)
    return _nats(x, kernel, ids[:, 1:], counted), jnp.sum(counted, dtype=jnp.int32)


@jax.custom_vjp
def _nats(x: Any, kernel: Any, targets: Any, counted: Any) -> Any:
    """The summed nats of the counted targets."""
    return _in_chunks(x, kernel, targets, counted, gradient=False)[0]


def _forward(*args: Any) -> Any:
    nats, *gradients = _in_chunks(*args, gradient=True)
    return nats, gradients


def _backward(gradients: Any, g: Any) -> Any:
    dx, dw = ((g * gradient).astype(gradient.dtype) for gradient in gradients)
    return dx, dw, None, None


_nats.defvjp(_forward, _backward)


def _in_chunks(x: Any, kernel: Any, targets: Any, counted: Any, *, gradient: bool) -> Any:
    """(nats, dx, dw), computed by each device for its rows; the gradients are 0 if not asked for."""
    of_rows = partial(_of_rows, gradient=gradient)
    if not shared_by_devices(x):
        return of_rows(x, kernel, targets, counted)

    def of_device(*args: Any) -> Any:
        nats, dx, dw = of_rows(*args)
        return lax.psum(nats, ROWS), dx, lax.psum(dw, ROWS)  # once, not once for each chunk

    rows, whole = PartitionSpec(ROWS), PartitionSpec()
    specs: Any = {"in_specs": (rows, whole, rows, rows), "out_specs": (whole, rows, whole)}
    sharded = jax.shard_map(of_device, axis_names={*ROWS}, check_vma=False, **specs)
    return sharded(x, kernel, targets, counted)


def _of_rows(x: Any, kernel: Any, targets: Any, counted: Any, *, gradient: bool) -> Any:
    """(nats, dx, dw) of these rows, over chunks of positions, one at a time."""
    w, wide = kernel.astype(x.dtype), jnp.promote_types(x.dtype, jnp.float32)
    vocab = w.shape[1]
    w = jnp.pad(w, ((0, 0), (0, padding.side(vocab, x.dtype) - vocab)))
    is_id = jnp.arange(w.shape[1]) < vocab

    def add(sums: Any, chunk: Any) -> Any:
        """((nats, dw) with those of the chunk, its dx)."""
        x, targets, counted = chunk
        logits = jnp.matmul(x, w, preferred_element_type=wide)
        logits = logits if w.shape[1] == vocab else jnp.where(is_id, logits, -jnp.inf)
        normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        nats = normalizer - jnp.take_along_axis(logits, targets[..., None], axis=-1)
        total, dw = sums
        total += jnp.sum(jnp.where(counted, nats[..., 0], 0))
        if not gradient:
            return (total, dw), 0
        d = jnp.exp(logits - normalizer) - jax.nn.one_hot(targets, w.shape[1], dtype=wide)
        d = jnp.where(counted[..., None], d, 0).astype(x.dtype)
        dw += jnp.einsum("bld,blv->dv", x, d, preferred_element_type=wide)
        return (total, dw), jnp.matmul(d, w.T)

    rows, length, width = x.shape
    count = min(length, -(-rows * length // CHUNK))
    missing = -length % count  # positions that do not count

    def chunks(v: Any) -> Any:
        v = jnp.pad(v, ((0, 0), (0, missing), *((0, 0),) * (v.ndim - 2)))
        return jnp.moveaxis(v.reshape(rows, count, -1, *v.shape[2:]), 1, 0)

    zeros = jnp.zeros((), wide), jnp.zeros(w.shape if gradient else (), wide)
    (nats, dw), dx = lax.scan(add, zeros, (chunks(x), chunks(targets), chunks(counted)))
    if gradient:
        dx = jnp.moveaxis(dx, 0, 1).reshape(rows, -1, width)[:, :length]
    return nats, dx, (dw[:, :vocab] if gradient else dw).astype(kernel.dtype)
