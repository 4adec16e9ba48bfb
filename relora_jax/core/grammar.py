"""Choices that are written as text, such as "magnitude(0.9)": one grammar reads and writes all of them.

A kind of choice (how moments are pruned, how a base kernel is stored, what a restart does, how rotary
positions are scaled) is a base class with a table {kind: class}. A variant is a class with a `kind`, its
numbers as the fields of a frozen dataclass, and its own behaviour: a new one is one class and a row in the
table. Nothing else asks which variant it is.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import ClassVar, TypeVar

_TEXT = re.compile(r"\s*([a-z_][a-z0-9_]*)\s*(?:\(([^()]*)\))?\s*")


@dataclasses.dataclass(frozen=True)
class Choice:
    """One choice; `str` writes it as `parse` reads it. Its fields, all numbers, stand in the brackets."""

    kind: ClassVar[str]

    def __str__(self) -> str:
        values = [repr(getattr(self, field.name)) for field in dataclasses.fields(self)]
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
    if kind not in table or len(numbers) != len(dataclasses.fields(table[kind])):
        raise ValueError(f"{what} {text!r} cannot be read: write {_written(table)}")
    return table[kind](*numbers)


def _written(table: Mapping[str, type[Choice]]) -> str:
    """What the table holds, as it is written: "zero, magnitude(prune_fraction) or none"."""
    names = {kind: [field.name for field in dataclasses.fields(choice)] for kind, choice in table.items()}
    *others, last = [f"{kind}({', '.join(fields)})" if fields else kind for kind, fields in names.items()]
    return f"{', '.join(others)} or {last}" if others else last
