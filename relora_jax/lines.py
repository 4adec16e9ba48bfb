"""The lines of metrics.jsonl: a row each, the last perhaps torn by a kill."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def whole(file: Path) -> Iterator[tuple[str, Row]]:
    """(line, row) of every line that is whole."""
    if not file.exists():
        return
    for line in file.read_bytes().decode("utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and "kind" in row and "update" in row:
                yield line, row


def cut(file: Path, restored_update: int) -> list[Row]:
    """Keeps rows with update <= u, restart rows with update < u: the resumed run does that restart anew."""
    end = {"restart": restored_update}
    kept = [
        (line, row) for line, row in whole(file) if row["update"] < end.get(row["kind"], restored_update + 1)
    ]
    replaced = file.with_suffix(".jsonl.tmp")
    with replaced.open("w", encoding="utf-8") as new:
        new.writelines(f"{line}\n" for line, _ in kept)
        new.flush()
        os.fsync(new.fileno())
    replaced.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, survives a power failure
    finally:
        os.close(folder)
    return [row for _, row in kept]
