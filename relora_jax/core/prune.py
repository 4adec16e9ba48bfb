"""Prune choices: which statistics of a factor survive a reset.

    zero()          nothing                                      "zero"
    magnitude(f)    the round((1 - f) n) largest first moments   "magnitude(0.9)"
    random(f)       round((1 - f) n) random entries              "random(0.99)"
    none()          everything                                   "none"

n is the number of entries of one factor in one layer; `round` is Python's, applied to the float64 product.
The text on the right is how configs and the command line write the choice. JAX is imported only where a mask
is computed, so that reading a config does not need it.
"""

import math
from typing import Any, ClassVar

from relora_jax.core import grammar


class Prune(grammar.Choice):
    """One prune choice. To add one, subclass with `kind` and `mask`, and add it to CHOICES.

    Fields, if any, are numbers, which the grammar parses as floats.
    """

    clears: ClassVar[bool] = True  # False: a reset changes nothing
    keeps_nothing: ClassVar[bool] = False  # True: a reset may set the factors' count to 0 as well

    @property
    def fraction(self) -> float:
        """The share of the entries that a reset clears."""
        return float(self.clears)

    def mask(self, statistic: Any, key: Any) -> Any:
        """[layers, n] bool: True for the entries of each layer of `statistic` that survive.

        `statistic` [layers, n] is the first moment of a factor (or else its first statistic), flattened per
        layer; the mask is applied to all statistics of that factor. `key` is unique to the factor.
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
    """Everything survives (an ablation in the paper)."""

    kind: ClassVar[str] = "none"
    clears: ClassVar[bool] = False

    def mask(self, statistic: Any, key: Any) -> Any:
        """True everywhere."""
        import jax.numpy as jnp

        return jnp.ones(statistic.shape, bool)


class _Fraction(Prune):
    """A fraction of the entries is cleared, from 0 to 1."""

    prune_fraction: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.prune_fraction) and 0 <= self.prune_fraction <= 1):
            raise ValueError(f"prune {self}: the fraction must be in [0, 1], such as magnitude(0.9)")

    @property
    def fraction(self) -> float:
        """As given."""
        return self.prune_fraction

    def survivors(self, entries: int) -> int:
        """round((1 - f) n): how many of the n entries of one factor in one layer survive."""
        return round((1 - self.prune_fraction) * entries)


class Magnitude(_Fraction):
    """The largest |first moments| survive; ties go to the lower index."""

    kind: ClassVar[str] = "magnitude"
    example: ClassVar[str] = "magnitude(0.9)"

    def mask(self, statistic: Any, key: Any) -> Any:
        """True for the largest absolute values of each layer."""
        return _largest(abs(statistic), self.survivors(statistic.shape[-1]))


class Random(_Fraction):
    """Random entries survive."""

    kind: ClassVar[str] = "random"
    example: ClassVar[str] = "random(0.99)"

    def mask(self, statistic: Any, key: Any) -> Any:
        """True for random entries of each layer."""
        import jax

        return _largest(jax.random.uniform(key, statistic.shape), self.survivors(statistic.shape[-1]))


CHOICES: dict[str, type[Prune]] = {choice.kind: choice for choice in (Zero, Magnitude, Random, Nothing)}


def zero() -> Prune:
    """A reset clears all statistics of the factors."""
    return Zero()


def none() -> Prune:
    """A reset leaves all statistics unchanged (an ablation in the paper)."""
    return Nothing()


def magnitude(prune_fraction: float) -> Prune:
    """A reset clears the `prune_fraction` of entries with the smallest |first moment|, per layer."""
    return Magnitude(float(prune_fraction))


def random(prune_fraction: float) -> Prune:
    """A reset clears a random `prune_fraction` of the entries, drawn per layer."""
    return Random(float(prune_fraction))


def parse(text: object) -> Prune:
    """The choice that `text` describes; parse(str(p)) == p. ValueError otherwise."""
    return grammar.parse(text, CHOICES, name="prune")


def _largest(scores: Any, count: int) -> Any:
    """True for exactly `count` entries of each layer of `scores` [layers, n]; ties go to the lower index.

    `lax.top_k` per layer: a quantile over a stacked leaf would starve whole layers and miscount ties.
    """
    import jax
    import jax.numpy as jnp

    _, index = jax.lax.top_k(scores, count)
    return jax.vmap(lambda i: jnp.zeros(scores.shape[-1], bool).at[i].set(True))(index)
