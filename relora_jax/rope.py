"""How fast rotary positions turn: theta^(-2i/h), and the usual scalings for longer rows.

    none                                           theta^(-2i/h)
    linear(factor)                                 all of them divided by factor
    dynamic(factor, length)                        a larger theta for rows beyond `length`
    llama3(factor, low, high, length)              the slow ones divided by factor
    yarn(factor, length, fast, slow, attention)    likewise, and a factor on cos and sin

`length` is the number of positions that the unscaled model was trained at. The numbers are those of a
published checkpoint's config: `factor`, `low_freq_factor`, `high_freq_factor`,
`original_max_position_embeddings`, `beta_fast`, `beta_slow`, `attention_factor`. Sources: Chen et al. 2023
(linear), bloc97 and emozilla (dynamic), Llama 3.1, YaRN (arXiv 2309.00071). h: head dimension; everything
is float64 on the host.
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

NUMBERS = {"none": 0, "linear": 1, "dynamic": 2, "llama3": 4, "yarn": 5}  # of each kind, all above 0
_TEXT = re.compile(r"\s*([a-z0-9]+)\s*(?:\(([^()]*)\))?\s*")
_GRAMMAR = "none, linear(factor), dynamic(factor, length), llama3(factor, low, high, length) or "
_GRAMMAR += "yarn(factor, length, fast, slow, attention)"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """One choice; `str` writes it as `parse` reads it."""

    kind: str
    numbers: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if NUMBERS.get(self.kind) != len(self.numbers):
            raise ValueError(f"rope scaling {self} is not known: write {_GRAMMAR}")
        if not all(math.isfinite(number) and number > 0 for number in self.numbers):
            raise ValueError(f"rope scaling {self}: its numbers must be finite and above 0")
        if self.kind == "llama3" and not self.numbers[1] < self.numbers[2]:
            raise ValueError(f"rope scaling {self}: low must be below high, such as 1.0 and 4.0")

    def __str__(self) -> str:
        return f"{self.kind}({', '.join(map(repr, self.numbers))})" if self.numbers else self.kind


def parse(text: str) -> Scaling:
    """The scaling that `text` writes; parse(str(s)) == s. ValueError with the grammar otherwise."""
    match = _TEXT.fullmatch(text)
    numbers = match[2] or "" if match else ""
    try:
        found = tuple(float(number) for number in numbers.split(",")) if numbers.strip() else ()
    except ValueError:
        match = None
    if match is None:
        raise ValueError(f"rope scaling {text!r} cannot be read: write {_GRAMMAR}")
    return Scaling(match[1], found)


def frequencies(
    head_dim: int, *, theta: float, scaling: Scaling, length: int
) -> tuple[np.ndarray[Any, np.dtype[np.float64]], float]:
    """(radians a position, of each of the h/2 pairs; the factor on cos and sin) in rows of `length` ids.

    Only `dynamic` depends on the length.
    """
    exponents = np.arange(head_dim // 2) / (head_dim // 2)
    numbers = scaling.numbers
    if scaling.kind == "linear":
        return theta**-exponents / numbers[0], 1.0
    if scaling.kind == "dynamic":
        factor, trained = numbers
        grown = factor * max(length, trained) / trained - (factor - 1)
        return (theta * grown ** (head_dim / max(head_dim - 2, 1))) ** -exponents, 1.0
    if scaling.kind == "llama3":
        return _llama3(theta**-exponents, *numbers), 1.0
    if scaling.kind == "yarn":
        return _yarn(theta**-exponents, theta, *numbers[:4]), numbers[4]
    return theta**-exponents, 1.0


def _llama3(plain: np.ndarray, factor: float, low: float, high: float, length: float) -> np.ndarray:
    """Pairs that turn more than `high` times within `length` stay, those below `low` times are slowed."""
    turns = length * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (kept + (1 - kept) / factor)


def _yarn(
    plain: np.ndarray, theta: float, factor: float, length: float, fast: float, slow: float
) -> np.ndarray:
    """Likewise, with a ramp over the pairs' indices between those of `fast` and of `slow` turns."""
    half = len(plain)

    def index(turns: float) -> float:
        return half * math.log(length / (turns * 2 * math.pi)) / math.log(theta)

    first, last = max(math.floor(index(fast)), 0), min(math.ceil(index(slow)), 2 * half - 1)
    kept = 1 - np.clip((np.arange(half) - first) / (last - first or 0.001), 0, 1)
    return plain * (kept + (1 - kept) / factor)
