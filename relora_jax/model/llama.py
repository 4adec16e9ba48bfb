"""The LLaMA decoder: RMSNorm, rotary positions, grouped-query attention, SwiGLU, and its families' additions.

Plain `nnx.Linear`s, in blocks that are stacked on a leading axis and scanned; nothing here is low-rank.
Shapes: B rows, L positions, D hidden, H query heads, K key-value heads, h head dimension, V vocabulary.
Every variable has named `axes`, which determine its sharding.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from relora_jax.config import ModelConfig
from relora_jax.core.product import PRODUCT
from relora_jax.families import FAMILIES
from relora_jax.model import rope
from relora_jax.model.attention import attend
from relora_jax.model.loss import token_loss
from relora_jax.model.padding import padded
from relora_jax.model.rows import on_rows, with_whole_rows

REMAT = ("auto", "none", "dots", "full")  # auto: training/remat.py; the others keep less and less
UNROLLED_LAYERS = 8  # on one CPU; with more, compiling takes longer


def check_heads(heads: int, kv_heads: int, head_dim: int) -> None:
    """Raises ValueError, starting with the argument's name, for incompatible head sizes."""
    if heads % kv_heads:
        raise ValueError(f"kv_heads {kv_heads} must divide heads {heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} must be even: rotary positions split it in two halves")


class Llama(nnx.Module):
    """Causal language model: logits [B, L, V] of ids [B, L], or the loss of ids [B, T], T = L + 1.

    `segment_ids` [B, L] number the documents within a row. With them, ids attend only to their own document:
    the logits equal those of each document run separately.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        dtype, param_dtype = dtypes(config)
        normal = nnx.initializers.normal(config.init_std)
        self.embed = Embedding(
            config.vocab_size,
            config.hidden,
            embedding_init=normal,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
            embedding_metadata={"axes": ("vocab", "embed")},
        )
        keys = jax.random.split(rngs.params(), config.layers)
        blocks = jax.vmap(lambda key: nnx.split(Block(config, rngs=nnx.Rngs(key)))[1])(keys)
        graph = nnx.split(nnx.eval_shape(lambda: Block(config, rngs=nnx.Rngs(0))))[0]
        self.blocks = nnx.merge(graph, blocks)
        self.norm = _norm(config, config.hidden, axes=("norm",), rngs=rngs)
        head = (config.hidden, config.vocab_size, ("embed", "vocab"), rngs)
        self.head = None if config.tied_embeddings else _linear(config, *head)
        self.remat, self.mlp = config.remat, config.mlp

    def __call__(
        self,
        ids: Int[Array, "B L"],
        segment_ids: Int[Array, "B L"] | None = None,
        *,
        at: Int[Array, " B"] | None = None,
    ) -> Float[Array, "B out V"]:
        """Logits in at least float32, at every position, or only at position `at` of each row."""
        x = self._hidden(ids, segment_ids)
        x = x if at is None else jnp.take_along_axis(x, at[:, None, None], axis=1)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return on_rows(jnp.matmul(x, self._head_kernel.astype(x.dtype), preferred_element_type=wide))

    def loss(
        self,
        ids: Int[Array, "B T"],
        lengths: Int[Array, " B"],
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """(summed nats, number) of the targets ids[:, 1:] that count, by `loss.token_loss`."""
        x = self._hidden(ids[:, :-1], None if segment_ids is None else segment_ids[:, :-1])
        return token_loss(x, self._head_kernel, ids, lengths, segment_ids)

    def hidden_states(
        self, ids: Int[Array, "B L"], segment_ids: Int[Array, "B L"] | None = None
    ) -> Float[Array, "layers B L D"]:
        """The residual stream after each block."""
        return self._blocks(ids, segment_ids, every=True)[1]

    @property
    def _head_kernel(self) -> Float[Array, "D V"]:
        return self.embed.embedding[...].T if self.head is None else self.head.kernel[...]

    def _hidden(self, ids: Int[Array, "B L"], segment_ids: Int[Array, "B L"] | None) -> Float[Array, "B L D"]:
        """The last hidden states, normalized."""
        return on_rows(self.norm(self._blocks(ids, segment_ids)[0]))

    def _blocks(self, ids: Any, segment_ids: Any, *, every: bool = False) -> tuple[Any, Any]:
        """The residual stream after the last block, and after each block if `every`."""
        graph, layers = nnx.split(self.blocks)
        positions, mask = jnp.arange(ids.shape[1])[None], None
        if segment_ids is not None:
            positions, mask = positions_and_mask(segment_ids)

        def block(x: Array, layer: Any) -> tuple[Array, Array | None]:
            layer = padded(layer, "mlp", self.mlp, x.dtype)
            x = on_rows(nnx.merge(graph, layer)(on_rows(x), positions, mask))
            return x, x if every else None

        unroll = _unrolled_layers(self.remat)
        return lax.scan(_remat(block, self.remat), on_rows(self.embed(ids)), layers, unroll=unroll)


class Norm(nnx.RMSNorm):
    """x / sqrt(mean(x^2) + epsilon) * scale, named in profiles."""

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*shape"], *args: Any, **options: Any) -> Float[Array, "*shape"]:
        """The normalized x."""
        return super().__call__(x, *args, **options)


class Embedding(nnx.Embed):
    """table[ids], the table [V, D] in the compute dtype; on a mesh, each device looks up its own ids."""

    @jax.named_scope("embedding")
    def __call__(self, ids: Int[Array, "*ids"], out_sharding: Any = None) -> Float[Array, "*ids D"]:
        """The row of each id."""
        return _lookup(self.embedding[...], ids, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table: Any, ids: Any, dtype: Any) -> Any:
    """The rows in the compute dtype; their gradients are summed in the table's, not rounded at each sum."""
    return jnp.take(with_whole_rows(table.astype(dtype)), ids, axis=0)


def _lookup_forward(table: Any, ids: Any, dtype: Any) -> Any:
    return _lookup(table, ids, dtype), (table, ids)


def _lookup_backward(dtype: Any, residuals: Any, dy: Any) -> Any:
    table, ids = residuals
    return with_whole_rows(jnp.zeros_like(table).at[ids].add(dy.astype(table.dtype))), None


_lookup.defvjp(_lookup_forward, _lookup_backward)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, config.hidden, axes=("layers", "norm"), rngs=rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, config.hidden, axes=("layers", "norm"), rngs=rngs)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], positions: Int[Array, "#B L"], mask: Bool[Array, "B L L"] | None
    ) -> Float[Array, "B L D"]:
        """One layer of the residual stream."""
        x = x + self.attention(self.attention_norm(x), positions, mask)
        return x + self.mlp(self.mlp_norm(x))


class Attention(nnx.Module):
    """Causal softmax(q k^T / sqrt(h)) v; each key-value head serves H / K query heads.

    In some families q, k and v have biases, or each head of q and k passes a norm before its rotation.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        query, value = config.heads * config.head_dim, config.kv_heads * config.head_dim
        axes, family = ("layers", "embed", "heads"), FAMILIES[config.family]
        self.q = _linear(config, config.hidden, query, axes, rngs, bias=family.qkv_bias)
        self.k = _linear(config, config.hidden, value, axes, rngs, bias=family.qkv_bias)
        self.v = _linear(config, config.hidden, value, axes, rngs, bias=family.qkv_bias)
        self.o = _linear(config, query, config.hidden, ("layers", "heads", "embed"), rngs)
        norm_axes, dim = ("layers", "norm"), config.head_dim
        self.q_norm = _norm(config, dim, axes=norm_axes, rngs=rngs) if family.qk_norm else None
        self.k_norm = _norm(config, dim, axes=norm_axes, rngs=rngs) if family.qk_norm else None
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.theta, self.scaling = config.rope_theta, rope.parse(config.rope_scaling)
        self.implementation = config.attention

    @jax.named_scope("attention")
    def __call__(
        self, x: Float[Array, "B L D"], positions: Int[Array, "#B L"], mask: Bool[Array, "B L L"] | None
    ) -> Float[Array, "B L D"]:
        """Causal self-attention, restricted to `mask` if given."""
        rows, length, _ = x.shape
        q = _product(self.q, x).reshape(rows, length, self.heads, self.head_dim)
        k = _product(self.k, x).reshape(rows, length, self.kv_heads, self.head_dim)
        v = _product(self.v, x).reshape(rows, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        frequencies = self.scaling.frequencies(self.head_dim, theta=self.theta, length=length)
        rotation = frequencies, self.scaling.amplitude()
        y = attend(
            rotate(q, positions, *rotation),
            rotate(k, positions, *rotation),
            v,
            mask,
            positions,
            implementation=self.implementation,
        )
        return _product(self.o, y.reshape(rows, length, -1))


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        axes = ("layers", "embed", "mlp")
        self.gate = _linear(config, config.hidden, config.mlp, axes, rngs)
        self.up = _linear(config, config.hidden, config.mlp, axes, rngs)
        self.down = _linear(config, config.mlp, config.hidden, ("layers", "mlp", "embed"), rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        """The feed-forward half of a block."""
        return _product(self.down, jax.nn.silu(_product(self.gate, x)) * _product(self.up, x))


def positions_and_mask(segment_ids: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Bool[Array, "B L L"]]:
    """(position of each id in its document, whether two ids belong to the same document)."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    is_start = jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0
    starts = lax.cummax(jnp.where(is_start, index, 0), axis=1)
    return index - starts, segment_ids[:, :, None] == segment_ids[:, None, :]


@jax.named_scope("rope")
def rotate(
    x: Float[Array, "B L heads h"], positions: Int[Array, "#B L"], frequencies: Any, factor: float
) -> Float[Array, "B L heads h"]:
    """(x1 cos - x2 sin, x2 cos + x1 sin) of the halves of each head, at angles position * frequencies [h/2].

    Computed in at least float32, with the halves of published LLaMA checkpoints. `factor` multiplies cos and
    sin (1 except for yarn).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    angle = jnp.multiply.outer(positions.astype(wide), jnp.asarray(frequencies, wide))[:, :, None, :]
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    x1, x2 = jnp.split(x.astype(wide), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def dtypes(config: ModelConfig) -> tuple[Any, Any]:
    """(compute dtype, dtype of the trained variables and moments: at least float32)."""
    dtype = jnp.dtype(config.compute_dtype)
    return dtype, jnp.promote_types(dtype, jnp.float32)


def _linear(
    config: ModelConfig,
    fan_in: int,
    fan_out: int,
    axes: tuple[str, ...],
    rngs: nnx.Rngs,
    *,
    bias: bool = False,
) -> nnx.Linear:
    dtype, param_dtype = dtypes(config)
    return nnx.Linear(
        fan_in,
        fan_out,
        use_bias=bias,
        kernel_init=nnx.initializers.normal(config.init_std),
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        kernel_metadata={"axes": axes},
        bias_metadata={"axes": (*axes[:-2], "bias")},
    )


def _product(layer: Any, x: Any) -> Any:
    """layer(x), named: a policy does not recognize the product in the custom VJP of a low-rank layer.

    With the tokens on one axis, since for several, XLA transposes dy in memory before the product x^T dy.
    """
    y = layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)
    return checkpoint_name(y, PRODUCT)


def _norm(config: ModelConfig, width: int, *, axes: tuple[str, ...], rngs: nnx.Rngs) -> Norm:
    dtype, param_dtype = dtypes(config)
    return Norm(
        width,
        epsilon=config.rms_eps,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
        scale_metadata={"axes": axes},
    )


def _unrolled_layers(remat: str) -> int:
    """How many layers an iteration of the scan computes: several on one CPU, where it copies what it stacks.

    One with rematerialization: without a loop between them, XLA merges a computation with its repetition.
    """
    mesh = jax.sharding.get_abstract_mesh()
    cpus = mesh.size if mesh.abstract_device is not None and mesh.abstract_device.platform == "cpu" else 0
    return UNROLLED_LAYERS if cpus == 1 and remat in ("auto", "none") else 1


def _remat(block: Any, remat: str) -> Any:
    """The block, rematerialized: "dots" saves its products with kernels, "full" only its input.

    "auto" that is not resolved is "none".
    """
    if remat in ("auto", "none"):
        return block
    policy = jax.checkpoint_policies.save_only_these_names(PRODUCT) if remat == "dots" else None
    return partial(jax.checkpoint, prevent_cse=False, policy=policy)(block)
