"""A choice is one class: what it must have is read off it, and what it cannot be is refused by a message."""

from typing import ClassVar

import pytest

from relora_jax.core import grammar


class Kind(grammar.Choice):
    """A kind of choice."""


class Most(Kind):
    kind: ClassVar[str] = "most"
    example: ClassVar[str] = "most(0.5)"
    share: float

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError("more than all")


class All(Most):
    """Without a decorator of its own, as a newcomer writes it; one number more than the class above."""

    kind: ClassVar[str] = "all"
    example: ClassVar[str] = "all(0.5, 2.0)"
    times: float


TABLE: dict[str, type[Kind]] = {"most": Most, "all": All}


def test_fields_are_those_of_the_class_without_a_decorator() -> None:
    made = grammar.parse("all(0.25, 3)", TABLE, what="a share")
    assert made == All(0.25, 3.0) and made != All(0.25, 2.0) and str(made) == "all(0.25, 3.0)"
    with pytest.raises(AttributeError, match="cannot assign"):
        made.times = 1.0  # pyright: ignore


def test_a_message_shows_what_may_be_written_and_numbers_are_judged_by_the_class() -> None:
    with pytest.raises(
        ValueError, match=r"a share 'all' cannot be read: write most\(0\.5\) or all\(0\.5, 2\.0\)"
    ):
        grammar.parse("all", TABLE, what="a share")
    with pytest.raises(ValueError, match="more than all"):
        grammar.parse("all(2, 1)", TABLE, what="a share")
