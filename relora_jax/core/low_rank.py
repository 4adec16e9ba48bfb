"""y = x @ W + (alpha / rank) * (x @ A) @ B: linear layers with a frozen base kernel and trainable factors.

`wrap` converts the linear layers of any NNX model (plain.py) to `LowRankDense`, `merge_and_reinit` is the
weights' half of a restart, and `unwrap` converts back to plain layers (ReLoRA, arXiv 2307.05695).

Shapes: `in`, `out` sides of the kernel; `r` rank; `*layers` leading axes of a stacked model.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from relora_jax.core import base, draw
from relora_jax.core import plain as plain_layers
from relora_jax.core.merge import delta, merge_layers
from relora_jax.core.paths import Path, modules, path_key, path_text, reference_count, replace_modules
from relora_jax.core.product import check as check_product
from relora_jax.core.product import product as low_rank_product

BASE_INITS = ("keep", "zero")
# what LowRankDense adds to the attributes of the plain layer
_OWN = ("plain", "base", "stored_names", "master", "lora_a", "lora_b", "dropout_key")
_OWN += ("rank", "alpha", "dropout", "product", "frozen_a")


class Frozen(nnx.Variable):
    """Changed by restarts only: not an `nnx.Param`, so it has no gradient and no optimizer state."""


class BaseKernel(Frozen):
    """W [*layers, in, out], or one of the arrays that it is stored as."""


class FrozenFactor(Frozen):
    """A [*layers, in, r] of a `LowRankDense` that trains B alone: redrawn at each restart."""


class BaseMaster(nnx.Variable):
    """W [*layers, in, out] in at least float32, beside a kernel in fewer bits: what merges are summed in."""


class LowRankFactor(nnx.LoRAParam):
    """B [*layers, r, out] or A [*layers, in, r] of a `LowRankDense`: trained, and merged at each restart.

    A type of its own, because the factors of `nnx.LoRA` and `nnx.LoRALinear` are never merged.
    """


class BranchKey(nnx.Variable):
    """Dropout keys [*layers] of one layer, set by `with_dropout_keys` for a single forward pass."""


class LowRankDense(nnx.Module):
    """y = x @ W + (alpha / rank) * (x @ A) @ B (+ bias): W frozen; A, B and bias trained.

    Initially computes the same function as `layer`: A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, so that B has
    a gradient from the first update. `frozen_a`, "normal" or "orthonormal" (draw.py), trains B alone.
    `base_init="zero"` sets W to 0 instead and draws both factors from
    U(-1/sqrt(r), 1/sqrt(r)). With `base_master`, W is also kept in at least float32, so that merges lose
    nothing (see `take_masters`). The kernel may be stacked: [*layers, in, out]. If the layer's own kernel has
    other axes (`nnx.LinearGeneral`, `nnx.Einsum`), W is that kernel as a matrix. It is called as `layer` is,
    and has its other attributes.
    """

    kernel: BaseKernel
    # of the plain layer
    bias: nnx.Variable | None
    dtype: Any
    param_dtype: Any
    precision: Any
    promote_dtype: Any

    def __init__(
        self,
        layer: Any,
        *,
        rank: int,
        alpha: float,
        key: Key[Array, ""],
        dropout: float = 0.0,
        product: str = "separate",
        base_dtype: Any = jnp.float32,
        base_init: str = "keep",
        base_master: bool = False,
        frozen_a: str = draw.TRAINED,
    ) -> None:
        plain = plain_layers.plain(layer)
        kernel = plain.matrix(layer.kernel[...])
        options: dict[str, Any] = {"dropout": dropout, "product": product, "base_init": base_init}
        check(kernel.shape, rank=rank, alpha=alpha, frozen_a=frozen_a, **options)
        *layers, fan_in, fan_out = kernel.shape
        keep = base_init == "keep"
        kernel = kernel if keep else jnp.zeros_like(kernel)
        chosen_base = base.parse(base_dtype)
        stored = chosen_base.store(kernel)
        _check_names(layer, chosen_base, stored)
        plain_layers.copy_attributes(layer, self)
        del self.kernel
        self.plain, self.base, self.stored_names = plain, chosen_base, tuple(stored)
        metadata = dict(plain.kernel_metadata) if plain.is_matrix else {}
        for name, part in stored.items():
            setattr(self, name, BaseKernel(part, **metadata))
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        self.master: Any = nnx.data(BaseMaster(kernel.astype(wide), **metadata) if base_master else None)
        axes = metadata.pop("axes", (*("layers",) * len(layers), "in", "out"))
        a_shape = (*layers, fan_in, rank)
        b = jnp.zeros((*layers, rank, fan_out), layer.param_dtype)
        if keep:
            a = draw.layers(draw.DRAWS[frozen_a], key, a_shape, layer.param_dtype)
        else:
            both = partial(draw.uniform, bound=1 / math.sqrt(rank))
            a = draw.layers(both, key, a_shape, layer.param_dtype)
            b = draw.layers(both, jax.random.fold_in(key, 1), b.shape, layer.param_dtype)
        kind_of_a = LowRankFactor if frozen_a == draw.TRAINED else FrozenFactor
        self.lora_a = kind_of_a(a, axes=(*axes[:-1], "rank"))
        self.lora_b = LowRankFactor(b, axes=(*axes[:-2], "rank", axes[-1]))
        self.dropout_key: Any = nnx.data(None)
        self.rank, self.alpha, self.dropout, self.product = rank, alpha, dropout, product
        self.frozen_a = frozen_a

    @property
    def scale(self) -> float:
        """Alpha / rank, the weight of the low-rank branch."""
        return self.alpha / self.rank

    @property
    def stored(self) -> base.Stored:
        """The arrays that W is stored as."""
        return {name: getattr(self, name)[...] for name in self.stored_names}

    def __call__(self, inputs: Any, out_sharding: Any = None, *, key: Any = None) -> Any:
        """x @ W + scale * (dropout(x) @ A) @ B (+ bias), in the shape that the plain layer's output has.

        Dropout is applied only with a key: `key`, or else the one set by `with_dropout_keys`.
        """
        w, a, b = self.stored, self.lora_a[...], self.lora_b[...]
        bias = None if self.bias is None else self.bias[...]
        of_kernel = jnp.zeros((), self.plain.kernel_dtype)  # its dtype counts, even if W is stored in another
        inputs, _, bias = self.promote_dtype((inputs, of_kernel, bias), dtype=self.dtype)
        if a.ndim > 2:
            raise ValueError(f"the layer is stacked, {a.shape[:-2]}: scan or map over its layers")
        plain = self.plain
        if plain.is_matrix:  # a model may have padded its variables
            plain = dataclasses.replace(plain, kernel_sizes=(a.shape[0], b.shape[1]))
        y = low_rank_product(
            plain.rows(inputs),
            self.base,
            lax.stop_gradient(w),
            a,
            b,
            scale=self.scale,
            form=self.product,
            frozen_a=self.frozen_a != draw.TRAINED,
            dropout=self.dropout,
            key=self.dropout_key[...] if key is None and self.dropout_key is not None else key,
            precision=self.precision,
            out_sharding=out_sharding if plain.is_matrix else None,
        )
        y = plain.outputs(y, bias, ndim=inputs.ndim)
        return y if out_sharding is None or plain.is_matrix else jax.sharding.reshard(y, out_sharding)

    def delta(self) -> Float[Array, "*layers in out"]:
        """scale * (A @ B), in at least float32 at highest precision."""
        return delta(self.lora_a[...], self.lora_b[...], self.scale)


class LowRankEinsum(LowRankDense):
    """A `LowRankDense` that is called as an `nnx.Einsum` is."""

    einsum_str: str

    def __call__(
        self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None, *, key: Any = None
    ) -> Any:
        """As `LowRankDense`; an `einsum_str` must be that of the layer."""
        if einsum_str is not None and einsum_str.replace(" ", "") != self.einsum_str.replace(" ", ""):
            raise ValueError(f"einsum_str {einsum_str!r} is not the layer's {self.einsum_str!r}")
        return super().__call__(inputs, out_sharding, key=key)


def wrap(
    model: Any,
    *,
    rank: int,
    alpha: float,
    targets: Callable[[Path, Any], bool],
    rngs: nnx.Rngs,
    dropout: float = 0.0,
    product: str = "separate",
    base_dtype: Any = jnp.float32,
    base_init: str = "keep",
    base_master: bool = False,
    frozen_a: str = draw.TRAINED,
) -> Any:
    """The model with its targeted linear layers replaced by `LowRankDense`, in place; same output by default.

    `targets(path, layer)` selects among the layers of type `nnx.Linear`, `nnx.LinearGeneral` (such as the
    projections of `nnx.MultiHeadAttention`) and `nnx.Einsum`; path is a tuple of attribute names and indices.
    Kernel and bias keep their values unless `base_init="zero"`; `base_dtype`, a dtype, its name or a
    `core.base.Base`, sets how the kernel is stored, and `base_master` whether it is also kept in float32 for
    merges. `frozen_a`, "normal" or "orthonormal", trains B alone, as RSO does. `dropout` zeroes this fraction
    of the branch's inputs, but only in calls with a key: `layer(x, key=...)`, or from `with_dropout_keys`;
    `rngs` are not used for it. One key is taken from `rngs.params()` and folded with each layer's path.

    ValueError if no layer is selected, or if some of those selected cannot be low-rank: all of them, each
    with its reason.
    """
    key = rngs.params()
    options: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "product": product}
    options |= {"base_dtype": base_dtype, "base_init": base_init, "base_master": base_master}
    options |= {"frozen_a": frozen_a}
    candidates = list(modules(model, plain_layers.KINDS))
    selected = [(path, layer) for path, layer in candidates if targets(path, layer)]
    if not selected:
        layers = ", ".join(path_text(path) for path, _ in candidates) or "it has none"
        raise ValueError(f"targets selects none of the model's {plain_layers.NAMES} layers: {layers}")
    low_rank, refused = {}, {}
    for path, layer in selected:
        kind = LowRankEinsum if isinstance(layer, nnx.Einsum) else LowRankDense
        try:
            if isinstance(layer.kernel.get_raw_value(), jax.ShapeDtypeStruct):
                raise ValueError("its kernel is only a shape: wrap inside nnx.eval_shape")
            if reference_count(model, layer.kernel) > 1:
                raise ValueError("its kernel is shared with another layer, which must be excluded too")
            low_rank[id(layer)] = kind(layer, key=path_key(key, path), **options)
        except ValueError as error:
            refused.setdefault(str(error), []).append(path_text(path))
    if refused:
        reasons = [f"{', '.join(paths)}: {reason}" for reason, paths in refused.items()]
        raise ValueError(f"targets selects layers that cannot be low-rank: exclude {'; '.join(reasons)}")
    return replace_modules(model, low_rank)


def unwrap(model: Any) -> Any:
    """Replaces each `LowRankDense` by the plain layer that it was, with kernel W + scale * (A @ B), in place.

    Its class, its attributes and the shape and dtype of its kernel are those from before `wrap`; biases
    remain the same Variables. ValueError if the model has no `LowRankDense`.
    """
    return replace_modules(model, {id(dense): _plain_layer(dense) for _, dense in low_rank_layers(model)})


def merge_and_reinit(model: Any, *, key: Key[Array, ""]) -> Any:
    """Sets W += scale * (A @ B), draws A as `wrap` did, B = 0, in place; same outputs up to rounding.

    Computed layer by layer in at least float32 at highest precision. The base type decides how the sum is
    rounded: a bfloat16 kernel stochastically, so that merges smaller than its spacing survive in the mean. A
    layer with a master adds to that, which loses nothing, and stores W as its master rounded to nearest.
    `key` is folded with each layer's path and index.
    """
    for path, dense in low_rank_layers(model):
        a, b = dense.lora_a[...], dense.lora_b[...]
        master = None if dense.master is None else dense.master[...]
        layer_key = path_key(key, path)
        options = (dense.scale, layer_key, master, dense.frozen_a)
        merged, a, master = merge_layers(dense.base, dense.stored, a, b, *options)
        if dense.master is not None:
            dense.master[...] = master
        for name, part in merged.items():
            getattr(dense, name)[...] = part
        dense.lora_a[...], dense.lora_b[...] = a, jnp.zeros_like(b)
    return model


def with_dropout_keys(model: Any, *, key: Key[Array, ""]) -> Any:
    """The model with a separate dropout key set in every low-rank layer that uses dropout, in place.

    For models that pass no key to their layers. Set keys for one forward pass only: they are model state.
    """
    for path, dense in low_rank_layers(model):
        if dense.dropout > 0:
            layers = dense.kernel[...].shape[:-2]
            keys = jax.random.split(path_key(key, path), layers) if layers else path_key(key, path)
            dense.dropout_key = nnx.data(BranchKey(keys, axes=("layers",) * len(layers)))
    return model


def take_masters(model: Any) -> dict[str, BaseMaster]:
    """{path of a layer: its master}, which the layers then no longer have: only merges need them.

    They can be anywhere, such as in the memory of the host, until `give_masters`.
    """
    masters = {}
    for path, dense in low_rank_layers(model):
        if dense.master is not None:
            masters[path_text(path)], dense.master = dense.master, nnx.data(None)
    return masters


def give_masters(model: Any, masters: dict[str, BaseMaster]) -> Any:
    """The inverse of `take_masters`: the model with its masters back, in place."""
    for path, dense in low_rank_layers(model):
        if master := masters.get(path_text(path)):
            dense.master = nnx.data(master)
    return model


def low_rank_layers(model: Any) -> list[tuple[Path, LowRankDense]]:
    """(path, layer) of every `LowRankDense`; ValueError if there is none."""
    layers = list(modules(model, LowRankDense))
    if not layers:
        raise ValueError("the model has no LowRankDense: call wrap first")
    return layers


def _plain_layer(dense: LowRankDense) -> Any:
    """The plain layer with the merged kernel."""
    plain = dense.plain
    merged = dense.base.read(dense.stored).astype(dense.delta().dtype) + dense.delta()
    layer = plain_layers.empty(plain.kind)
    plain_layers.copy_attributes(dense, layer)
    for name in (*_OWN, *dense.stored_names):
        delattr(layer, name)
    kernel = plain.kernel(merged).astype(plain.kernel_dtype)
    layer.kernel = plain.kernel_kind(kernel, **dict(plain.kernel_metadata))
    return layer


def check(
    shape: tuple[int, ...],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    product: str = "separate",
    base_init: str = "keep",
    frozen_a: str = draw.TRAINED,
) -> None:
    """Raises ValueError, starting with the argument's name, for options invalid for a kernel of this shape.

    `shape` is [*layers, in, out].
    """
    fan_in, fan_out = shape[-2:]
    if not 1 <= rank <= min(fan_in, fan_out):
        raise ValueError(
            f"rank {rank} does not fit a {fan_in} x {fan_out} kernel: choose 1 to {min(fan_in, fan_out)}"
        )
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha {alpha} must be finite and above 0, such as 32")
    check_product(product, dropout)
    if base_init not in BASE_INITS:
        raise ValueError(f"base_init {base_init!r} is not valid: use {' or '.join(BASE_INITS)}")
    if frozen_a not in draw.DRAWS:
        raise ValueError(f"frozen_a {frozen_a!r} is not valid: use {', '.join(draw.DRAWS)}")
    if base_init == "zero" and frozen_a != draw.TRAINED:
        raise ValueError(f"base_init zero draws both factors to train them: it excludes frozen_a {frozen_a}")


def _check_names(layer: Any, chosen_base: base.Base, stored: base.Stored) -> None:
    """Raises ValueError if the names of the stored arrays are not allowed, or the layer uses one of ours."""
    if "kernel" not in stored or not all(name.startswith("kernel") for name in stored):
        raise ValueError(
            f"base_dtype {chosen_base} stores {list(stored)}: use the names kernel and kernel_..."
        )
    own = {*_OWN, *stored, *vars(LowRankDense)} - {"kernel"}
    taken = sorted(name for name in vars(layer).keys() & own if not name.startswith("_"))
    if taken:
        raise ValueError(f"class {type(layer).__name__} has attributes that a low-rank layer has: {taken}")
