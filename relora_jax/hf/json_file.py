"""JSON of another's making, read without trust: of a size that is asked for, no name of an object twice."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from relora_jax.errors import UserError


def read(path: Path, *, most_bytes: int) -> Any:
    """What the file says. UserError where it is larger, no JSON, or has a name twice."""
    size = path.stat().st_size
    if size > most_bytes:
        raise UserError(f"{path} has {size:,} bytes: no file of its kind is so large")
    return parse(path, path.read_bytes())


def parse(path: Path, content: bytes) -> Any:
    """What the JSON says that was read in `path`. UserError as above."""
    try:
        return json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise broken(path, shown(error)) from error


def broken(path: Path, reason: str) -> UserError:
    """The error of a file that is not what its name says."""
    return UserError(f"{path} is not whole, or no file of its kind ({reason}): bring it again")


def shown(said: object) -> str:
    """A short line that a terminal can show, whatever a file made a library say."""
    return "".join(c if c.isprintable() else "?" for c in str(said))[:200]


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"it names {twice!r} twice")
    return found
