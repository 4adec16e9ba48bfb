"""Columns as one table, for a terminal."""

from collections.abc import Callable, Sequence

from relora_jax.benchmark.column import Column
from relora_jax.planning.table import aligned, gigabytes

SHOWN_S = 5e-5  # of a cause: less is 0.0 ms


def rows(columns: Sequence[Column], *, compiled: bool) -> list[list[str]]:
    """The table: a header, then a label and a cell for each column."""
    first = columns[0]
    table = [["", *(column.name for column in columns)]]

    def row(label: str, cell: Callable[[Column], str]) -> None:
        table.append([label, *(cell(column) for column in columns)])

    if compiled:
        row("step, roofline of the compiled kernels", lambda column: milliseconds(column.median_s))
        for cause in max((column.causes_s for column in columns), key=len):
            if any(column.causes_s.get(cause, 0) >= SHOWN_S for column in columns):
                row(f"  {cause}", lambda column, cause=cause: _time(column.causes_s.get(cause)))
    else:
        row("step, median (quartiles)", _step)
    row(f"step, to {first.name}", lambda column: f"{column.ratio(first):.3f}")
    row("tokens/s" + ", at most" * compiled, lambda column: f"{column.tokens_per_s:,.0f}")
    row("MFU" + ", at most" * compiled, lambda column: _percent(column.mfu))
    row("model FLOPs per token", lambda column: f"{column.flops_per_token:.3e}")
    if not compiled:
        row("peak memory, measured", lambda column: _size(column.peak_bytes))
    row("memory, compiled", lambda column: _size(column.compiled_bytes))
    row(f"memory, to {first.name}", lambda column: _ratio(column.memory_ratio(first)))
    row("restart", lambda column: _time(column.restart_s))
    row("restart, of a cycle", lambda column: _percent(column.restart_share))
    return table


def text(columns: Sequence[Column], *, device: str, compiled: bool) -> str:
    """The table in aligned columns, with what it is of above it."""
    config, rounds = columns[0].config, len(columns[0].step_s)
    title = (
        f"{config.name} on {device}: an update is {config.train.batch} rows of "
        f"{config.data.sequence_length}, "
        + ("compiled, not run" if compiled else f"{rounds} of each, alternately")
    )
    return "\n".join([title, *aligned(rows(columns, compiled=compiled))])


def milliseconds(seconds: float) -> str:
    """Seconds in ms, with three digits or more."""
    return f"{1e3 * seconds:,.{1 if seconds < 0.1 else 0}f} ms"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else milliseconds(seconds)


def _step(column: Column) -> str:
    low, high = (1e3 * seconds for seconds in column.quartiles_s)
    digits = 1 if column.median_s < 0.1 else 0
    return f"{milliseconds(column.median_s)} ({low:,.{digits}f} - {high:,.{digits}f})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def _size(count: float | None) -> str:
    return "-" if count is None else gigabytes(count)


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"
