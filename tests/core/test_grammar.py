"""A choice is a single class: its fields define its text, and an invalid text gets a helpful message."""

from typing import ClassVar

import pytest

from relora_jax.core import grammar


class Share(grammar.Choice):
    """A family of choices."""


class Most(Share):
    kind: ClassVar[str] = "most"
    example: ClassVar[str] = "most(0.5)"
    share: float

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError("more than all")


class All(Most):
    """No @dataclass decorator, and one more number than its parent class."""

    kind: ClassVar[str] = "all"
    example: ClassVar[str] = "all(0.5, 2.0)"
    times: float


TABLE: dict[str, type[Share]] = {"most": Most, "all": All}


def test_fields_need_no_dataclass_decorator() -> None:
    choice = grammar.parse("all(0.25, 3)", TABLE, name="a share")
    assert choice == All(0.25, 3.0) and choice != All(0.25, 2.0) and str(choice) == "all(0.25, 3.0)"
    with pytest.raises(AttributeError, match="cannot assign"):
        choice.times = 1.0  # pyright: ignore


def test_message_lists_valid_texts_and_the_class_validates_its_numbers() -> None:
    with pytest.raises(
        ValueError, match=r"a share 'all' is not valid: use most\(0\.5\) or all\(0\.5, 2\.0\)"
    ):
        grammar.parse("all", TABLE, name="a share")
    with pytest.raises(ValueError, match="more than all"):
        grammar.parse("all(2, 1)", TABLE, name="a share")
