"""y = x @ W + (alpha / rank) * (x @ A) @ B: linear layers with a frozen base kernel and trainable factors.

`wrap` converts `nnx.Linear`s of any NNX model to `LowRankDense`, `merge_and_reinit` is the weights' half of a
restart, and `unwrap` converts back to plain `nnx.Linear`s (ReLoRA, arXiv 2307.05695).

Shapes: `in`, `out` sides of the kernel; `r` rank; `*layers` leading axes of a stacked model.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Key

from relora_jax.core import base
from relora_jax.core.merge import delta, merge_layers
from relora_jax.core.paths import Path, modules, path_key, path_text, reference_count, replace_modules
from relora_jax.core.product import check as check_product
from relora_jax.core.product import product as low_rank_product

BASE_INITS = ("keep", "zero")


class BaseKernel(nnx.Variable):
    """W [*layers, in, out], or one of the arrays that it is stored as: changed by merges only.

    Not an `nnx.Param`, so it has no gradient and no optimizer state.
    """


class LowRankFactor(nnx.LoRAParam):
    """A [*layers, in, r] or B [*layers, r, out] of a `LowRankDense`: trained, and merged at each restart.

    A type of its own, because the factors of `nnx.LoRA` and `nnx.LoRALinear` are never merged.
    """


class BranchKey(nnx.Variable):
    """Dropout keys [*layers] of one layer, set by `with_dropout_keys` for a single forward pass."""


class LowRankDense(nnx.Module):
    """y = x @ W + (alpha / rank) * (x @ A) @ B (+ bias): W frozen; A, B and bias trained.

    Initially computes the same function as `linear`: A ~ U(-1/sqrt(in), 1/sqrt(in)) and B = 0, so that B has
    a gradient from the first update. `base_init="zero"` sets W to 0 instead and draws both factors from
    U(-1/sqrt(r), 1/sqrt(r)). The kernel may be stacked: [*layers, in, out].
    """

    kernel: BaseKernel

    def __init__(
        self,
        linear: nnx.Linear,
        *,
        rank: int,
        alpha: float,
        key: Key[Array, ""],
        dropout: float = 0.0,
        product: str = "separate",
        base_dtype: Any = jnp.float32,
        base_init: str = "keep",
    ) -> None:
        _check_plain(linear)
        kernel = linear.kernel[...]
        check(kernel.shape, rank=rank, alpha=alpha, dropout=dropout, product=product, base_init=base_init)
        metadata = dict(linear.kernel.get_metadata())
        *layers, fan_in, fan_out = kernel.shape
        keep = base_init == "keep"
        self.base = base.parse(base_dtype)
        stored = self.base.store(kernel if keep else jnp.zeros_like(kernel))
        self.stored_names = tuple(stored)
        if "kernel" not in stored or not all(name.startswith("kernel") for name in stored):
            raise ValueError(
                f"base_dtype {self.base} stores {list(stored)}: use the names kernel and kernel_..."
            )
        for name, part in stored.items():
            setattr(self, name, BaseKernel(part, **metadata))
        bound = 1 / math.sqrt(fan_in if keep else rank)
        axes = metadata.pop("axes", (*("layers",) * len(layers), "in", "out"))
        a = _uniform_layers(key, (*layers, fan_in, rank), bound, linear.param_dtype)
        b = jnp.zeros((*layers, rank, fan_out), linear.param_dtype)
        if not keep:
            b = _uniform_layers(jax.random.fold_in(key, 1), b.shape, bound, linear.param_dtype)
        self.lora_a = LowRankFactor(a, axes=(*axes[:-1], "rank"))
        self.lora_b = LowRankFactor(b, axes=(*axes[:-2], "rank", axes[-1]))
        self.bias = linear.bias
        self.dropout_key: Any = nnx.data(None)
        self.rank, self.alpha, self.dropout, self.product = rank, alpha, dropout, product
        self.dtype, self.param_dtype, self.precision = linear.dtype, linear.param_dtype, linear.precision

    @property
    def scale(self) -> float:
        """Alpha / rank, the weight of the low-rank branch."""
        return self.alpha / self.rank

    @property
    def stored(self) -> base.Stored:
        """The arrays that W is stored as."""
        return {name: getattr(self, name)[...] for name in self.stored_names}

    def __call__(self, x: Float[Array, "*tokens in"], *, key: Any = None) -> Float[Array, "*tokens out"]:
        """x @ W + scale * (dropout(x) @ A) @ B (+ bias).

        Dropout is applied only with a key: `key`, or else the one set by `with_dropout_keys`.
        """
        bias = None if self.bias is None else self.bias[...]
        a, b, w = self.lora_a[...], self.lora_b[...], self.stored
        dtype = self.dtype or jnp.result_type(x, self.param_dtype)
        key = self.dropout_key[...] if key is None and self.dropout_key is not None else key
        y = low_rank_product(
            x.astype(dtype),
            self.base,
            lax.stop_gradient(w),
            a,
            b,
            scale=self.scale,
            form=self.product,
            dropout=self.dropout,
            key=key,
            precision=self.precision,
        )
        return y if bias is None else y + bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))

    def delta(self) -> Float[Array, "*layers in out"]:
        """scale * (A @ B), in at least float32 at highest precision."""
        return delta(self.lora_a[...], self.lora_b[...], self.scale)


def wrap(
    model: Any,
    *,
    rank: int,
    alpha: float,
    targets: Callable[[Path, nnx.Linear], bool],
    rngs: nnx.Rngs,
    dropout: float = 0.0,
    product: str = "separate",
    base_dtype: Any = jnp.float32,
    base_init: str = "keep",
) -> Any:
    """The model with its targeted `nnx.Linear`s replaced by `LowRankDense`, in place; same output by default.

    `targets(path, linear)` selects layers; path is a tuple of attribute names and indices. Kernel and bias
    keep their values unless `base_init="zero"`; `base_dtype`, a dtype, its name or a `core.base.Base`, sets
    how the kernel is stored. One key is taken from `rngs.params()` and folded with each layer's path.
    ValueError if no layer is selected, or a selected layer computes anything but x @ W + bias.
    """
    key = rngs.params()
    options: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "product": product}
    options |= {"base_dtype": base_dtype, "base_init": base_init}
    linears = list(modules(model, nnx.Linear))
    selected = [(path, linear) for path, linear in linears if targets(path, linear)]
    if not selected:
        layers = ", ".join(path_text(path) for path, _ in linears) or "it has none"
        raise ValueError(f"targets selects none of the model's nnx.Linear layers: {layers}")
    low_rank = {}
    for path, linear in selected:
        if reference_count(model, linear.kernel) > 1:
            raise ValueError(
                f"{path_text(path)} shares its kernel with another layer: exclude both from targets"
            )
        try:
            low_rank[id(linear)] = LowRankDense(linear, key=path_key(key, path), **options)
        except ValueError as error:
            raise ValueError(f"{path_text(path)}: {error}") from None
    return replace_modules(model, low_rank)


def unwrap(model: Any) -> Any:
    """Replaces each `LowRankDense` by an `nnx.Linear` with kernel W + scale * (A @ B), in place.

    Biases remain the same Variables. ValueError if the model has no `LowRankDense`.
    """
    return replace_modules(model, {id(dense): _linear(dense) for _, dense in low_rank_layers(model)})


def merge_and_reinit(model: Any, *, key: Key[Array, ""]) -> Any:
    """Sets W += scale * (A @ B), A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0 in place; same outputs up to rounding.

    Computed layer by layer in at least float32 at highest precision. The base type decides how the sum is
    rounded: a bfloat16 kernel stochastically, so that merges smaller than its spacing survive in the mean.
    `key` is folded with each layer's path and index.
    """
    for path, dense in low_rank_layers(model):
        a, b = dense.lora_a[...], dense.lora_b[...]
        merged, a = merge_layers(dense.base, dense.stored, a, b, dense.scale, path_key(key, path))
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


def low_rank_layers(model: Any) -> list[tuple[Path, LowRankDense]]:
    """(path, layer) of every `LowRankDense`; ValueError if there is none."""
    layers = list(modules(model, LowRankDense))
    if not layers:
        raise ValueError("the model has no LowRankDense: call wrap first")
    return layers


def _uniform_layers(key: Any, shape: tuple[int, ...], bound: float, dtype: Any) -> Any:
    """U(-bound, bound) of shape [*layers, m, n], each layer drawn from a separate key."""
    *layers, m, n = shape
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(math.prod(layers)))
    draw = jax.vmap(lambda k: jax.random.uniform(k, (m, n), dtype, -bound, bound))
    return draw(keys).reshape(shape)


def _linear(dense: LowRankDense) -> nnx.Linear:
    """The plain layer with the merged kernel."""
    *_, fan_in, fan_out = dense.kernel[...].shape
    dtypes = {"dtype": dense.dtype, "param_dtype": dense.param_dtype, "precision": dense.precision}
    linear = nnx.eval_shape(
        lambda: nnx.Linear(fan_in, fan_out, use_bias=dense.bias is not None, rngs=nnx.Rngs(0), **dtypes)
    )
    merged = dense.base.read(dense.stored).astype(dense.delta().dtype) + dense.delta()
    linear.kernel = nnx.Param(merged.astype(dense.param_dtype), **dense.kernel.get_metadata())
    linear.bias = dense.bias
    return linear


def check(
    shape: tuple[int, ...],
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    product: str = "separate",
    base_init: str = "keep",
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


def _check_plain(linear: Any) -> None:
    """Raises ValueError for a layer that computes anything but x @ W + bias."""
    plain = nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    custom = [n for n in ("dot_general", "promote_dtype") if getattr(linear, n) is not getattr(plain, n)]
    if getattr(linear, "preferred_element_type", None) is not None:
        custom.append("preferred_element_type")
    if type(linear) is not nnx.Linear or custom:
        layer = f"custom {', '.join(custom)}" if custom else f"class {type(linear).__name__}"
        raise ValueError(
            f"only a plain nnx.Linear can be low-rank, not one with {layer}: exclude it from targets"
        )
