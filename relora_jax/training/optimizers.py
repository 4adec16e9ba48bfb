"""Full-rank optimizers by name, `optimizer.name`: how gradients become updates, before the learning rate.

    adamw                  Adam's moments of every parameter
    muon                   orthogonalized momentum of the blocks' kernels, Adam for the rest
                           (optax.contrib.muon)
    galore(rank, updates)  Adam within a subspace of each kernel of the blocks, sought again after so many
                           updates, Adam for the rest (arXiv 2403.03507, optax.contrib.galore)
    scale                  gradients divided by the RMS of each column, with momentum for the head alone, and
                           Adam for norms and biases (arXiv 2506.16659)

All but adamw are what a user may pick instead of ReLoRA: only the arms full and control take them. The
blocks' kernels are stacked: [layers, in, out].
"""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_galore, scale_by_muon

from relora_jax.core import grammar
from relora_jax.core.paths import is_variable

ADAM_RMS = 0.2  # of Adam's updates: Muon's are scaled to it, so that both take one rate (arXiv 2502.16982)
GALORE_SCALE = 0.25  # of GaLore's updates: the paper's alpha
MOMENTUM = 0.9  # of SCALE's head


class Optimizer(grammar.Choice):
    """One optimizer. To add one, subclass with `kind` and `scaling`, and add it to CHOICES."""

    def scaling(self, params: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """The transformation of gradients; `adam` is for what the optimizer leaves to Adam."""
        raise NotImplementedError


class Adamw(Optimizer):
    """Adam for every parameter."""

    kind: ClassVar[str] = "adamw"

    def scaling(self, params: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """Adam's."""
        return adam


class Muon(Optimizer):
    """Muon for the blocks' kernels, layer by layer."""

    kind: ClassVar[str] = "muon"

    def scaling(self, params: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """In the groups "kernels" and "rest"."""
        axes = MuonDimensionNumbers(reduction_axis=1, output_axis=2)  # of each layer; by default of 2D arrays

        def axes_of_each(updates: Any) -> Any:
            return jax.tree.map(lambda _: axes, updates)

        def with_rms_of_adam(update: Any) -> Any:  # an orthogonal one has the RMS 1 / sqrt(longer side)
            return ADAM_RMS * math.sqrt(max(update.shape[-2:])) * update

        rms = optax.stateless(lambda updates, params: jax.tree.map(with_rms_of_adam, updates))
        muon = optax.chain(scale_by_muon(weight_dimension_numbers=axes_of_each), rms)
        return kernels_apart(params, muon, adam)


class Galore(Optimizer):
    """GaLore for the blocks' kernels, layer by layer. Its state is on every device in full."""

    kind: ClassVar[str] = "galore"
    example: ClassVar[str] = "galore(128, 200)"
    rank: float
    updates: float

    def __post_init__(self) -> None:
        """Raises ValueError for numbers that are no counts."""
        if not all(value >= 1 and value.is_integer() for value in (self.rank, self.updates)):
            raise ValueError(f"name {self}: rank and updates must be integers of at least 1")

    def scaling(self, params: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """In the groups "kernels" and "rest"."""
        galore = scale_by_galore(int(self.rank), int(self.updates), GALORE_SCALE, adam)
        return kernels_apart(params, by_layer(galore), adam)


class Scale(Optimizer):
    """SCALE: no moments but the head's first one (and Adam's of norms and biases, which are small)."""

    kind: ClassVar[str] = "scale"

    def scaling(self, params: Any, adam: optax.GradientTransformation) -> optax.GradientTransformation:
        """In the groups "head", "matrices" and "vectors"; a tied embedding is the head."""
        columns = normalize_columns()
        head = optax.chain(optax.ema(MOMENTUM, debias=False), columns)
        groups: Any = {"head": head, "matrices": columns, "vectors": adam}
        has_head = any(_axes(leaf) == HEAD for leaf in jax.tree.leaves(params, is_leaf=is_variable))

        def label(leaf: Any) -> str:
            if _is_vector(leaf):
                return "vectors"
            return "head" if _axes(leaf) == (HEAD if has_head else EMBEDDING) else "matrices"

        return optax.partition(groups, jax.tree.map(label, params, is_leaf=is_variable))


CHOICES: dict[str, type[Optimizer]] = {choice.kind: choice for choice in (Adamw, Muon, Galore, Scale)}
HEAD, EMBEDDING = ("embed", "vocab"), ("vocab", "embed")  # axes


def parse(text: object) -> Optimizer:
    """The optimizer that `text` names. ValueError, listing the valid ones, otherwise."""
    return grammar.parse(text, CHOICES, name="name")


def kernels_apart(
    params: Any, of_kernels: optax.GradientTransformation, rest: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One transformation for the kernels [layers, in, out] of the blocks, another for the rest."""

    def label(leaf: Any) -> str:
        return "kernels" if is_kernel(leaf) else "rest"

    groups: Any = {"kernels": of_kernels, "rest": rest}
    return optax.partition(groups, jax.tree.map(label, params, is_leaf=is_variable))


def is_kernel(leaf: Any) -> bool:
    """Whether the variable is [layers, in, out]: a kernel of the blocks, or a factor of one."""
    return leaf.ndim == 3 and not _is_vector(leaf)


def by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` for each layer of stacked arrays alone, one after another: its state has a layers axis, too.

    The state consists of plain arrays. `vmap` would carry out both branches of a `cond` within `tx`.
    """

    def init(params: Any) -> Any:
        return jax.vmap(tx.init)(jax.tree.leaves(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        arrays, structure = jax.tree.flatten(updates)
        scaled, state = jax.lax.map(lambda layer: tx.update(*layer), (arrays, state))
        return jax.tree.unflatten(structure, scaled), state

    return optax.GradientTransformation(init, update)


def normalize_columns() -> optax.GradientTransformation:
    """Divides each column [in] of each matrix [*layers, in, out] by its RMS; columns of zeros stay."""

    def normalized(update: Any) -> Any:
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=-2, keepdims=True))
        return update / jnp.maximum(rms, 1e-8)

    return optax.stateless(lambda updates, params: jax.tree.map(normalized, updates))


def _axes(leaf: Any) -> tuple[str, ...]:
    return getattr(leaf, "axes", ())


def _is_vector(leaf: Any) -> bool:
    """Whether the variable is one vector per layer: a norm or a bias."""
    return bool({"norm", "bias"} & {*_axes(leaf)})
