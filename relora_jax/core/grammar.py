"""Choices written as text, such as "magnitude(0.9)", and the one grammar that parses and prints all of them.

Each family of choices (how moments are pruned, how a base kernel is stored, what a restart does, how rotary
positions are scaled) is a base class with a table {kind: class}. A variant is a class with a `kind`, numeric
fields and its own behavior: adding one takes a class and a row in the table.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar, dataclass_transform

_TEXT = re.compile(r"\s*([a-z_][a-z0-9_]*)\s*(?:\(([^()]*)\))?\s*")


@dataclass_transform(frozen_default=True)
class Choice:
    """One choice; `str` prints it as `parse` reads it. Subclasses become frozen dataclasses of numbers."""

    kind: ClassVar[str]
    example: ClassVar[str] = ""  # shown in error messages; empty if the kind alone is the whole text

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        dataclasses.dataclass(frozen=True)(cls)

    def __post_init__(self) -> None:
        """Raises ValueError for invalid numbers."""

    def __str__(self) -> str:
        values = [repr(getattr(self, field.name)) for field in dataclasses.fields(self)]  # pyright: ignore
        return f"{self.kind}({', '.join(values)})" if values else self.kind


C = TypeVar("C", bound=Choice)


def parse(text: object, table: Mapping[str, type[C]], *, name: str) -> C:
    """The choice in `table` that `text` describes; parse(str(c)) == c.

    ValueError, listing the valid texts, if there is none. The class itself validates its numbers.
    """
    match = _TEXT.fullmatch(text) if isinstance(text, str) else None
    kind, inside = (match[1], (match[2] or "").strip()) if match else ("", "")
    try:
        numbers = [float(number) for number in inside.split(",")] if inside else []
    except ValueError:
        kind = ""
    if kind not in table or len(numbers) != len(dataclasses.fields(table[kind])):  # pyright: ignore
        *others, last = [choice.example or kind for kind, choice in table.items()]
        options = f"{', '.join(others)} or {last}" if others else last
        raise ValueError(f"{name} {text!r} is not valid: use {options}")
    return table[kind](*numbers)  # pyright: ignore
