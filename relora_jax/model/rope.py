"""Frequencies of rotary positions, theta^(-2i/h), and the common scalings for longer rows.

    none                                           theta^(-2i/h)
    linear(factor)                                 all frequencies divided by factor
    dynamic(factor, length)                        a larger theta for rows longer than `length`
    llama3(factor, low, high, length)              low frequencies divided by factor
    yarn(factor, length, fast, slow, attention)    likewise, and a factor on cos and sin

Fields have the names of published checkpoint configs; `length`, the number of positions that the unscaled
model was trained with, is `original_max_position_embeddings`. Sources: Chen et al. 2023 (linear), bloc97 and
emozilla (dynamic), Llama 3.1, YaRN (arXiv 2309.00071). h: head dimension; all values are float64 on the host.
"""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from relora_jax.core import grammar

Frequencies = np.ndarray[Any, np.dtype[np.float64]]  # radians per position, for each of the h/2 pairs


class Scaling(grammar.Choice):
    """One scaling. To add one, subclass with `kind` and `frequencies`, and add it to CHOICES."""

    def __post_init__(self) -> None:
        numbers = dataclasses.astuple(self)
        if not all(math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"rope scaling {self}: its numbers must be finite and above 0")

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """Radians per position of each pair, for rows of `length` ids."""
        return theta ** -(np.arange(head_dim // 2) / (head_dim // 2))

    def amplitude(self) -> float:
        """The factor on cos and sin."""
        return 1.0


class Unscaled(Scaling):
    """theta^(-2i/h)."""

    kind: ClassVar[str] = "none"


class Linear(Scaling):
    """All frequencies divided by `factor`."""

    kind: ClassVar[str] = "linear"
    example: ClassVar[str] = "linear(4.0)"
    factor: float

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """theta^(-2i/h) / factor."""
        return super().frequencies(head_dim, theta=theta, length=length) / self.factor


class Dynamic(Scaling):
    """A theta that grows with the row length beyond the original training length."""

    kind: ClassVar[str] = "dynamic"
    example: ClassVar[str] = "dynamic(2.0, 2048.0)"
    factor: float
    original_max_position_embeddings: float

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """theta^(-2i/h) with a scaled theta, which depends on `length`."""
        original = self.original_max_position_embeddings
        growth = self.factor * max(length, original) / original - (self.factor - 1)
        theta = theta * growth ** (head_dim / max(head_dim - 2, 1))
        return super().frequencies(head_dim, theta=theta, length=length)


class Llama3(Scaling):
    """Pairs with over `high` turns in the original length are unchanged, those below `low` scaled."""

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
        """Interpolated by each pair's number of turns."""
        plain = super().frequencies(head_dim, theta=theta, length=length)
        turns = self.original_max_position_embeddings * plain / (2 * math.pi)
        ramp = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return plain * (ramp + (1 - ramp) / self.factor)


class Yarn(Scaling):
    """Like llama3, but interpolated by pair index, between `beta_fast` and `beta_slow` turns."""

    kind: ClassVar[str] = "yarn"
    example: ClassVar[str] = "yarn(4.0, 4096.0, 32.0, 1.0, 1.14)"
    factor: float
    original_max_position_embeddings: float
    beta_fast: float
    beta_slow: float
    attention_factor: float

    def frequencies(self, head_dim: int, *, theta: float, length: int) -> Frequencies:
        """Interpolated by pair index."""
        plain = super().frequencies(head_dim, theta=theta, length=length)
        half = len(plain)

        def index(turns: float) -> float:
            original = self.original_max_position_embeddings
            return half * math.log(original / (turns * 2 * math.pi)) / math.log(theta)

        first = max(math.floor(index(self.beta_fast)), 0)
        last = min(math.ceil(index(self.beta_slow)), 2 * half - 1)
        ramp = 1 - np.clip((np.arange(half) - first) / (last - first or 0.001), 0, 1)
        return plain * (ramp + (1 - ramp) / self.factor)

    def amplitude(self) -> float:
        """The configured `attention_factor`."""
        return self.attention_factor


CHOICES: dict[str, type[Scaling]] = {
    choice.kind: choice for choice in (Unscaled, Linear, Dynamic, Llama3, Yarn)
}


def parse(text: object) -> Scaling:
    """The scaling that `text` describes; parse(str(s)) == s. ValueError otherwise."""
    return grammar.parse(text, CHOICES, name="rope scaling")
