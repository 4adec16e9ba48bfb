"""Formats numbers and durations for people, and values as JSON."""

import json
import math
from typing import Any


def describe(row: dict[str, Any], *, left_s: float) -> list[str]:
    """A train row as text: loss, perplexity, learning rate, tokens/s, MFU if it is known, time left."""
    loss, learning_rate, speed = row["loss"], row["lr"], row["tokens_per_s"]
    parts = [
        f"loss {number(loss, '.3f')}",
        f"perplexity {number(perplexity(loss), ',.1f')}",
        f"lr {number(learning_rate, '.1e')}",
        f"{number(speed, ',.0f')} tokens/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"{row['mfu']:.0%} MFU")
    if math.isfinite(left_s):
        parts.append(f"{duration(left_s)} left")
    return parts


def perplexity(loss: float | int | None) -> float | None:
    """exp(loss), loss in nats; None if it would not be finite."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def number(value: float | int | None, form: str) -> str:
    """`value` formatted with `form`; "-" for None."""
    return "-" if value is None else format(value, form)


def duration(seconds: float | int) -> str:
    """Seconds as m:ss, h:mm:ss, or days and hours."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def strict_json(value: Any) -> str:
    """The value as JSON in lines, with null for numbers that are not finite."""
    return json.dumps(_finite(value), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
