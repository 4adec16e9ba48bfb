"""Choices that are written as text, such as "magnitude(0.9)": one grammar reads and writes all of them.

A kind of choice (how moments are pruned, how a base kernel is stored, what a restart does, how rotary
positions are scaled) is a base class with a table {kind: class}. A variant is a class with a `kind`, its
numbers as fields, and its own behaviour: a new one is one class and a row in the table.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, dataclass_transform

_TEXT = re.compile(r"\s*([a-z_][a-z0-9_]*)\s*(?:\(([^()]*)\))?\s*")


@dataclass_transform(frozen_default=True)
class Choice:
    """One choice; `str` writes it as `parse` reads it. Every class below is a frozen dataclass of numbers."""

    kind: ClassVar[str]
    example: ClassVar[str] = ""  # how it is written, for messages; its kind where that is all

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        """ValueError for numbers that make no choice."""

    def __str__(self) -> str:
        values = [repr(getattr(self, field.name)) for field in dataclasses.fields(self)]  # pyright: ignore
        return f"{self.kind}({', '.join(values)})" if values else self.kind


C = TypeVar("C", bound=Choice)


def parse(text: object, table: Mapping[str, type[C]], *, what: str) -> C:
    """The choice of the table that `text` writes; parse(str(c)) == c.

    ValueError, which says what may be written, for any other text; the class itself judges its numbers.
    """
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    kind, inside = (match[1], (match[2] or "").strip()) if match else ("", "")
    try:
        numbers = [float(number) for number in inside.split(",")] if inside else []
    except ValueError:
        kind = ""
    if kind not in table or len(numbers) != len(dataclasses.fields(table[kind])):  # pyright: ignore
        *others, last = [choice.example or kind for kind, choice in table.items()]
        written = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{what} {text!r} cannot be read: write {written}")
    return table[kind](*numbers)  # pyright: ignore
