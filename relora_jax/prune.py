"""Which statistics of a factor survive a reset: a value and the grammar it is written in.

    zero()          nothing survives                                  "zero"
    magnitude(f)    the round((1 - f) n) largest first moments do     "magnitude(0.9)"
    random(f)       as many do, drawn                                 "random(0.99)"
    none()          everything does                                   "none"

n is the number of entries of one factor of one layer, `round` Python's of the float64 product.
The text on the right is how a config, the command line and a saved config write the choice.
"""

import dataclasses
import math
import re

KINDS = ("zero", "magnitude", "random", "none")
_WITH_FRACTION = ("magnitude", "random")
_TEXT = re.compile(r"\s*([a-z]+)\s*(?:\(\s*([^()\s]*)\s*\))?\s*")


@dataclasses.dataclass(frozen=True)
class Prune:
    """One choice; `prune_fraction` is the share of entries that a reset clears (0 to 1)."""

    kind: str
    prune_fraction: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"prune {self.kind!r} is not known: write zero, magnitude(f), random(f) or none")
        if not (math.isfinite(self.prune_fraction) and 0 <= self.prune_fraction <= 1):
            raise ValueError(
                f"prune {self.kind}({self.prune_fraction}) clears an impossible share: "
                "the fraction lies between 0 and 1, such as magnitude(0.9)"
            )

    def kept(self, entries: int) -> int:
        """How many of `entries` statistics of one factor of one layer survive."""
        if self.kind == "none":
            return entries
        if self.kind == "zero":
            return 0
        return round((1 - self.prune_fraction) * entries)

    def __str__(self) -> str:
        return f"{self.kind}({self.prune_fraction!r})" if self.kind in _WITH_FRACTION else self.kind


def zero() -> Prune:
    """A reset clears every statistic of the factors."""
    return Prune("zero")


def none() -> Prune:
    """A reset leaves every statistic as it is (a row of the paper's ablation)."""
    return Prune("none", 0.0)


def magnitude(prune_fraction: float) -> Prune:
    """A reset clears the `prune_fraction` of entries with the smallest |first moment|, per layer."""
    return Prune("magnitude", float(prune_fraction))


def random(prune_fraction: float) -> Prune:
    """A reset clears `prune_fraction` of the entries, drawn per layer."""
    return Prune("random", float(prune_fraction))


def parse(text: str) -> Prune:
    """The choice that `text` writes; parse(str(p)) == p. ValueError with the grammar otherwise."""
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    kind, number = match.groups() if match else (None, None)
    if kind in ("zero", "none") and number in (None, ""):
        return zero() if kind == "zero" else none()
    if kind in _WITH_FRACTION and number:
        try:
            return Prune(kind, float(number))
        except ValueError as error:
            if "clears" in str(error):
                raise
    raise ValueError(f"prune {text!r} cannot be read: write zero, magnitude(0.9), random(0.99) or none")
