"""How fast rotary positions turn: theta^(-2i/h), and the usual scalings for longer rows.

    none                                           theta^(-2i/h)
    linear(factor)                                 all of them divided by factor
    dynamic(factor, length)                        a larger theta for rows beyond `length`
    llama3(factor, low, high, length)              the slow ones divided by factor
    yarn(factor, length, fast, slow, attention)    likewise, and a factor on cos and sin

A scaling's numbers have the names of a published checkpoint's config, where `length`, the positions that the
unscaled model was trained at, is `original_max_position_embeddings`. Sources: Chen et al. 2023 (linear),
bloc97 and emozilla (dynamic), Llama 3.1, YaRN (arXiv 2309.00071). h: head dimension; everything is float64
on the host.
"""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from relora_jax.core import grammar

Frequencies = np.ndarray[Any, np.dtype[np.float64]]  # radians a position, of each of the h/2 pairs


class Scaling(grammar.Choice):
    """One scaling; another one is a class that has `frequencies`, and a row in CHOICES."""

    def __post_init__(self) -> None:
        numbers = dataclasses.astuple(self)
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"rope scaling {self}: its numbers must be finite and above 0")

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """Radians a position of each pair, in rows of `length` ids."""
        return theta ** -(np.arange(head_dim // 2) / (head_dim // 2))

    def amplitude(self) -> float:
        """The factor on cos and sin."""
        return 1.0


class Unscaled(Scaling):
    """theta^(-2i/h)."""

    kind: ClassVar[str] = "none"


class Linear(Scaling):
    """All pairs `factor` times slower."""

    kind: ClassVar[str] = "linear"
    example: ClassVar[str] = "linear(4.0)"
    factor: float

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """theta^(-2i/h) / factor."""
        return super().frequencies(head_dim, theta=theta, length=length) / self.factor


class Dynamic(Scaling):
    """A theta that grows with rows beyond the length that the model was trained at."""

    kind: ClassVar[str] = "dynamic"
    example: ClassVar[str] = "dynamic(2.0, 2048.0)"
    factor: float
    original_max_position_embeddings: float

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """Those of the grown theta; the only ones that depend on `length`."""
        trained = self.original_max_position_embeddings
        grown = self.factor * max(length, trained) / trained - (self.factor - 1)
        theta = theta * grown ** (head_dim / max(head_dim - 2, 1))
        return super().frequencies(head_dim, theta=theta, length=length)


class Llama3(Scaling):
    """Pairs that turn more than `high` times within the trained length stay, those below `low` are slowed."""

    kind: ClassVar[str] = "llama3"
    example: ClassVar[str] = "llama3(8.0, 1.0, 4.0, 8192.0)"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope scaling {self}: low must be below high, such as 1.0 and 4.0")

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """A ramp over the pairs' turns."""
        plain = super().frequencies(head_dim, theta=theta, length=length)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)


class Yarn(Scaling):
    """Likewise, with a ramp over the pairs' indices between those of `fast` and of `slow` turns."""

    kind: ClassVar[str] = "yarn"
    example: ClassVar[str] = "yarn(4.0, 4096.0, 32.0, 1.0, 1.14)"
    factor: float
    original_max_position_embeddings: float
    beta_fast: float
    beta_slow: float
    attention_factor: float

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """A ramp over the pairs' indices."""
        plain = super().frequencies(head_dim, theta=theta, length=length)
        half = len(plain)

        def index(turns: float) -> float:
            trained = self.original_max_position_embeddings
            return half * math.log(trained / (turns * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(index(self.beta_fast)), 0)
        last = min(math.ceil(index(self.beta_slow)), 2 * half - 1)
        kept = 1 - np.clip((np.arange(half) - first) / (last - first or 0.001), 0, 1)
        return plain * (kept + (1 - kept) / self.factor)

    def amplitude(self) -> float:
        """The one that is given."""
        return self.attention_factor


CHOICES: dict[str, type[Scaling]] = {
    choice.kind: choice for choice in (Unscaled, Linear, Dynamic, Llama3, Yarn)
}


def parse(text: object) -> Scaling:
    """The scaling that `text` writes; parse(str(s)) == s. ValueError with the grammar otherwise."""
    return grammar.parse(text, CHOICES, what="rope scaling")
