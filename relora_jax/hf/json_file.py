"""JSON from untrusted files: of limited size, without duplicate keys."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from relora_jax.errors import UserError


def read(path: Path, *, max_bytes: int) -> Any:
    """The file's content. UserError if it is larger, not JSON, or has a duplicate key."""
    size = path.stat().st_size
    if size > max_bytes:
        raise UserError(f"{path} has {size:,} bytes, expected at most {max_bytes:,}: download it again")
    return parse(path, path.read_bytes())


def parse(path: Path, content: bytes) -> Any:
    """The value of JSON that was read from `path`; errors as in `read`."""
    try:
        return json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise invalid(path, printable(error)) from error


def invalid(path: Path, reason: str) -> UserError:
    """The error for a file whose content is not of its format."""
    return UserError(f"{path} is truncated or invalid ({reason}): download it again")


def printable(message: object) -> str:
    """The start of a library's message, which may quote a file, in characters that a terminal can show."""
    return "".join(c if c.isprintable() else "?" for c in str(message))[:200]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {key!r}")
    return result
