"""How pictures look: colors, axes, the styles of several lines, and a PNG without pyplot or global state."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from relora_jax.storage.location import AnyPath

INK, GREY, FAINT = "#24313d", "#7b8794", "#dfe4e9"
BLUE, ORANGE, GREEN = "#2b6cb0", "#d9702c", "#2f8f6b"

# For comparisons: colors for readers with color blindness (Okabe and Ito), then dashes
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*"

Points = Sequence[tuple[float, float]]  # (updates or tokens, value)


def line(n: int) -> dict[str, Any]:
    """The style of the nth curve."""
    return {"color": COLORS[n % 7], "linestyle": DASHES[n // 7 % 4], "linewidth": 1.6}


def style(axes: Axes) -> None:
    """Gives axes their grid, ticks and spines."""
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis, labeled at 1, 2 and 5 times powers of 10."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


def save(figure: Figure, file: AnyPath) -> None:
    """Writes a figure as PNG."""
    with file.open("wb") as stream:
        FigureCanvasAgg(figure).print_png(stream)


def arrays(points: Points) -> tuple[np.ndarray, np.ndarray]:
    """The two coordinates of points."""
    pairs = np.asarray(points, np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]
