"""Causal attention in several implementations, and which of them a run uses.

    xla      JAX's own: all weights, B x H x L x L, are in memory at once
    cudnn    the flash kernel of NVIDIA's library: they never are
    splash   JAX's flash kernel for TPUs, likewise
    einsum   written out for CPUs: less memory and time than xla, exact in float64
    auto     einsum on CPUs, cudnn on GPUs since Ampere, and splash on TPUs, if it suits the run; else xla

Shapes: B rows, L positions, H query heads, K key-value heads, h head dimension.
"""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from relora_jax.config import Config
from relora_jax.model import splash

ATTENTION = ("auto", "xla", "einsum", "cudnn", "splash")
EINSUM_BLOCKS = 2  # of queries: the first does not see the keys of the second
GPU = ("gpu", "cuda")  # a device, and a topology's


def resolved(config: Config, device: Any) -> str:
    """`model.attention`, with "auto" replaced by what is fastest on such devices."""
    if config.model.attention != "auto":
        return config.model.attention
    if device.platform == "cpu":
        return "einsum"
    if device.platform == "tpu":  # in shorter rows, most of a block would be padding
        suits = config.data.sequence_length >= splash.LANES and config.model.compute_dtype == "bfloat16"
        return "splash" if suits else "xla"
    generation = re.match(r"(\d+)\.", device.compute_capability) if device.platform in GPU else None
    since_ampere = generation is not None and int(generation[1]) >= 8  # AMD's have names, such as gfx942
    # Separate documents need a mask, L x L for each row: most of what the kernel does not hold otherwise.
    plain = config.data.attend_across_documents and config.model.head_dim <= 128
    return "cudnn" if since_ampere and plain and not cudnn_refusal(config) else "xla"


def cudnn_refusal(config: Config) -> str:
    """Why cuDNN's attention supports the dtype or shape of a run on no GPU, with the remedy; else empty."""
    model, length = config.model, config.data.sequence_length
    if model.compute_dtype != "bfloat16":
        return (
            f"computes in bfloat16, not in model.compute_dtype {model.compute_dtype}: set that to bfloat16, "
            "or model.attention to xla"
        )
    if model.head_dim % 8 or model.head_dim > 256:
        return (
            f"needs a model.head_dim that is a multiple of 8 up to 256, not {model.head_dim}: set "
            "model.attention to xla"
        )
    if length % 2:
        return f"needs an even data.sequence_length, not {length}: change it, or set model.attention to xla"
    if not config.data.attend_across_documents and length % 128 == 64:  # PyTorch's issue 196678
        return (
            "may give NaN gradients with data.attend_across_documents=false at a data.sequence_length that "
            f"leaves 64 modulo 128, as {length}: change it, or set model.attention to xla"
        )
    return ""


def attend(
    q: Float[Array, "B L H h"],
    k: Float[Array, "B L K h"],
    v: Float[Array, "B L K h"],
    mask: Bool[Array, "B L L"] | None = None,
    positions: Int[Array, "#B L"] | None = None,
    *,
    implementation: str,
) -> Float[Array, "B L H h"]:
    """Causal attention, restricted to `mask` [B, query, key] if given; "auto" that is not resolved is "xla".

    "splash" takes the documents from `positions` in them, of which the mask is made. "einsum" is written out
    here, because JAX's own implementations round to float32.
    """
    if implementation == "splash":
        # a document is known by its first position
        return splash.attend(
            q, k, v, None if mask is None or positions is None else jnp.arange(q.shape[1])[None] - positions
        )
    if implementation != "einsum":
        implementation = "xla" if implementation == "auto" else implementation
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            mask=None if mask is None else mask[:, None],
            is_causal=True,
            implementation=implementation,  # pyright: ignore
        )
    rows, length, heads, dim = q.shape
    q = q.reshape(rows, length, k.shape[2], heads // k.shape[2], dim)
    visible = jnp.tril(jnp.ones((1, length, length), bool))
    visible = visible if mask is None else visible & mask
    bounds = [i * length // EINSUM_BLOCKS for i in range(EINSUM_BLOCKS + 1)]
    blocks = [
        _einsum(q[:, start:stop], k[:, :stop], v[:, :stop], visible[:, start:stop, :stop])
        for start, stop in itertools.pairwise(bounds)
        if start < stop
    ]
    return jnp.concatenate(blocks, axis=1).reshape(rows, length, heads, dim)


def _einsum(
    q: Float[Array, "B l K G h"],
    k: Float[Array, "B m K h"],
    v: Float[Array, "B m K h"],
    visible: Bool[Array, "#B l m"],
) -> Float[Array, "B l K G h"]:
    """Attention of some queries; what is normalized is the sum of values, smaller than the weights."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("blkgh,bmkh->bkglm", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    total = jnp.einsum("bkglm,bmkh->bkglh", weights.astype(v.dtype), v, preferred_element_type=wide)
    return jnp.moveaxis(total / jnp.sum(weights, axis=-1, keepdims=True), 3, 1).astype(v.dtype)
