"""JAX's flash kernel for TPUs, splash attention: no weights in memory, and no work above the diagonal.

Shapes: B rows, L positions, H query heads, K key-value heads, h head dimension.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from relora_jax.model.rows import ROWS, shared_by_devices

LANES, LARGEST_BLOCK = 128, 512  # positions


def attend(
    q: Float[Array, "B L H h"],
    k: Float[Array, "B L K h"],
    v: Float[Array, "B L K h"],
    documents: Int[Array, "B L"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B L H h"]:
    """softmax(q k^T / sqrt(h)) v over the positions up to each one's own, of the same document if numbered.

    Each device computes its own rows and heads. Positions are padded to a multiple of LANES, where nothing
    sees them. `interpret`: without a TPU, for tests.
    """
    of_device = partial(_of_device, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return of_device(q, k, v, documents)
    rows = ROWS if shared_by_devices(q) else None
    heads, ids = PartitionSpec(rows, None, "tensor"), PartitionSpec(rows)
    specs: Any = {"in_specs": (heads, heads, heads, ids), "out_specs": heads}
    return jax.shard_map(of_device, check_vma=False, **specs)(q, k, v, documents)


def _of_device(q: Any, k: Any, v: Any, documents: Any, *, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as library  # not needed elsewhere, and slow

    length, dim = q.shape[1], q.shape[-1]
    missing = -length % LANES
    total = length + missing
    q, k, v = (jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    documents = None if documents is None else jnp.pad(documents, ((0, 0), (0, missing)))
    block = max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if total % size == 0)
    sides = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{side}": block for side in sides}
    kernel = library.make_splash_mha(
        library.MultiHeadMask([library.CausalMask((total, total))] * q.shape[1]),
        block_sizes=library.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def of_row(q: Any, k: Any, v: Any, documents: Any) -> Any:
        ids = None if documents is None else library.SegmentIds(documents, documents)
        return kernel(q, k, v, segment_ids=ids)

    y = jax.vmap(of_row)((q * dim**-0.5).astype(q.dtype), k, v, documents)
    return y.swapaxes(1, 2)[:, :length]
