"""Which statistics of a factor survive a reset: a value that makes the mask.

    zero()          nothing survives                                  "zero"
    magnitude(f)    the round((1 - f) n) largest first moments do     "magnitude(0.9)"
    random(f)       as many do, drawn                                 "random(0.99)"
    none()          everything does                                   "none"

n is the number of entries of one factor of one layer, `round` Python's of the float64 product.
The text on the right is how a config, the command line and a saved config write the choice. JAX is imported
where a mask is made: a config, which holds a choice, is read without it.
"""

import math
from typing import Any, ClassVar

from relora_jax.core import grammar


class Prune(grammar.Choice):
    """One choice. Another one is a class with `kind` and `mask`, and a row in CHOICES.

    Its fields, if it has any, are numbers, which the grammar reads as floats.
    """

    clears: ClassVar[bool] = True  # whether a reset clears anything at all
    keeps_nothing: ClassVar[bool] = False  # so that the factors' count can be reset as well

    def mask(self, statistic: Any, key: Any) -> Any:
        """[layers, n] bool: True for the entries of each layer of `statistic` that survive.

        `statistic` [layers, n] is the first moment of a factor, its two sides flattened, where the optimizer
        keeps one; the mask is used for all statistics of that factor. `key` is this factor's alone.
        """
        raise NotImplementedError


class Zero(Prune):
    """Nothing survives."""

    kind: ClassVar[str] = "zero"
    keeps_nothing: ClassVar[bool] = True

    def mask(self, statistic: Any, key: Any) -> Any:
        """False everywhere."""
        import jax.numpy as jnp

        return jnp.zeros(statistic.shape, bool)


class Nothing(Prune):
    """Everything survives (a row of the paper's ablation)."""

    kind: ClassVar[str] = "none"
    clears: ClassVar[bool] = False

    def mask(self, statistic: Any, key: Any) -> Any:
        """True everywhere."""
        import jax.numpy as jnp

        return jnp.ones(statistic.shape, bool)


class _Share(Prune):
    """A share of the entries is cleared, from 0 to 1."""

    prune_fraction: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.prune_fraction) and 0 <= self.prune_fraction <= 1):
            raise ValueError(
                f"prune {self} clears an impossible share: "
                "the fraction lies between 0 and 1, such as magnitude(0.9)"
            )

    def kept(self, entries: int) -> int:
        """round((1 - f) n): how many of n entries of one factor of one layer survive."""
        return round((1 - self.prune_fraction) * entries)


class Magnitude(_Share):
    """The largest |first moments| survive; of equal ones the lower index."""

    kind: ClassVar[str] = "magnitude"
    example: ClassVar[str] = "magnitude(0.9)"

    def mask(self, statistic: Any, key: Any) -> Any:
        """True for the largest absolute values of each layer."""
        return _largest(abs(statistic), self.kept(statistic.shape[-1]))


class Random(_Share):
    """Entries that are drawn survive."""

    kind: ClassVar[str] = "random"
    example: ClassVar[str] = "random(0.99)"

    def mask(self, statistic: Any, key: Any) -> Any:
        """True for entries drawn in each layer."""
        import jax

        return _largest(jax.random.uniform(key, statistic.shape), self.kept(statistic.shape[-1]))


CHOICES: dict[str, type[Prune]] = {choice.kind: choice for choice in (Zero, Magnitude, Random, Nothing)}


def zero() -> Prune:
    """A reset clears every statistic of the factors."""
    return Zero()


def none() -> Prune:
    """A reset leaves every statistic as it is (a row of the paper's ablation)."""
    return Nothing()


def magnitude(prune_fraction: float) -> Prune:
    """A reset clears the `prune_fraction` of entries with the smallest |first moment|, per layer."""
    return Magnitude(float(prune_fraction))


def random(prune_fraction: float) -> Prune:
    """A reset clears `prune_fraction` of the entries, drawn per layer."""
    return Random(float(prune_fraction))


def parse(text: object) -> Prune:
    """The choice that `text` writes; parse(str(p)) == p. ValueError with the grammar otherwise."""
    return grammar.parse(text, CHOICES, what="prune")


def _largest(scores: Any, kept: int) -> Any:
    """True for exactly `kept` entries of each layer of `scores` [layers, n]; of equals the lower index.

    `lax.top_k` per layer: a quantile of a stacked leaf would starve whole layers and miscount ties.
    """
    import jax
    import jax.numpy as jnp

    _, index = jax.lax.top_k(scores, kept)
    return jax.vmap(lambda i: jnp.zeros(scores.shape[-1], bool).at[i].set(True))(index)
