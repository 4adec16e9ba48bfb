"""metrics.jsonl and time.jsonl: a row per line in strict JSON; a kill may leave the last one incomplete."""

import contextlib
import json
import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from relora_jax.storage.location import AnyPath
from relora_jax.storage.writer import Writer

NAME = "metrics.jsonl"
# What differs between two runs that are equal otherwise
TIMES = ("tokens_per_s", "mfu", "data_share", "peak_bytes", "elapsed_s")

Row = dict[str, Any]


def read(workdir: AnyPath, name: str = NAME) -> list[Row]:
    """The rows of a run, in order, without an incomplete last line; no file means no rows."""
    return [row for _, row in _complete_lines(workdir / name)]


def cut(writer: Writer, restored_update: int, name: str = NAME) -> list[Row]:
    """Keeps rows with update <= u, restart rows only with update < u: a resumed run repeats that restart."""
    end = {"restart": restored_update}
    lines = [
        (line, row)
        for line, row in _complete_lines(writer.folder / name)
        if row["update"] < end.get(row["kind"], restored_update + 1)
    ]
    writer.write(name, "".join(f"{line}\n" for line, _ in lines))
    return [row for _, row in lines]


def median(rows: Iterable[Row], name: str) -> float | None:
    """The median of a value of the train rows, such as tokens_per_s; None if no row has one."""
    values = [row[name] for row in rows if row["kind"] == "train" and row.get(name)]
    return statistics.median(values) if values else None


def _complete_lines(file: AnyPath) -> Iterator[tuple[str, Row]]:
    """(line, row) of every complete line."""
    if not file.exists():
        return
    for line in file.read_bytes().decode("utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and "kind" in row and "update" in row:
                yield line, row
