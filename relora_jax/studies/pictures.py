"""The pictures of a study's report."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, NullLocator, StrMethodFormatter

from relora_jax.reporting import drawing
from relora_jax.reporting.drawing import GREY, INK, Points
from relora_jax.storage.location import AnyPath


def curves(file: AnyPath, curves: Mapping[str, Mapping[str, Points]]) -> None:
    """Draws each arm's perplexity over what it used, {arm: {what: points}}, each what in a panel."""
    labels = list(next(iter(curves.values())))
    figure = Figure(figsize=(12, 4.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(labels), sharey=True)
    for axes, label in zip(panels, labels, strict=True):
        for n, (name, points) in enumerate(curves.items()):
            used, values = drawing.arrays(points[label])
            axes.plot(used, values, label=name, **drawing.line(n))
        drawing.style(axes)
        axes.set_xlabel(label, color=INK)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    drawing.log_scale(panels[0])
    panels[0].set_ylabel("validation perplexity (log scale)", color=INK)
    _legend(figure, panels[0], columns=5)
    drawing.save(figure, file)


def gaps(file: AnyPath, gaps: Mapping[str, Mapping[int, Any]]) -> None:
    """Draws each method's difference to full rank by the parameters of the model, with its interval."""
    with _panel(file, "parameters of the full-rank model (log scale)", "loss above full rank (nats)") as axes:
        for n, (method, by_size) in enumerate(gaps.items()):
            sizes = sorted(by_size)
            means = [by_size[size].mean for size in sizes]
            widths = [by_size[size].half_width for size in sizes]  # NaN, of a single pair, is not drawn
            axes.errorbar(sizes, means, yerr=widths, marker="o", capsize=3, label=method, **drawing.line(n))
        axes.axhline(0, color=GREY, linewidth=1.2, linestyle="--")
        _log_ticks(
            axes, {size for by_size in gaps.values() for size in by_size}, EngFormatter(places=1, sep="")
        )


def rates(file: AnyPath, by_rate: Mapping[str, Mapping[float, float]]) -> None:
    """Draws each arm's final perplexity by peak learning rate; those that diverged are left out."""
    with _panel(file, "peak learning rate (log scale)", "validation perplexity (log scale)") as axes:
        for n, (name, values) in enumerate(by_rate.items()):
            rates, perplexities = drawing.arrays([(r, p) for r, p in values.items() if np.isfinite(p)])
            axes.plot(rates, perplexities, marker="o", markersize=5, label=name, **drawing.line(n))
        _log_ticks(
            axes, {rate for values in by_rate.values() for rate in values}, StrMethodFormatter("{x:g}")
        )
        drawing.log_scale(axes)


def spectra(file: AnyPath, spectra: Mapping[str, Float[np.ndarray, "layers side"]]) -> None:
    """Draws the median over the layers of each arm's singular values, by index."""
    with _panel(file, "index, largest first", "singular value (log scale)") as axes:
        for n, (name, values) in enumerate(spectra.items()):
            axes.plot(
                np.arange(1, values.shape[1] + 1), np.median(values, axis=0), label=name, **drawing.line(n)
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=1e-3)


def _log_ticks(axes: Axes, values: Collection[float], formatter: Formatter) -> None:
    """A logarithmic x axis with a tick at each value."""
    axes.set_xscale("log")
    axes.set_xticks(sorted(values))
    axes.xaxis.set_major_formatter(formatter)
    axes.xaxis.set_minor_locator(NullLocator())


@contextlib.contextmanager
def _panel(file: AnyPath, x: str, y: str) -> Iterator[Axes]:
    """Axes of a picture of one panel, which is saved afterwards with its labels and its legend."""
    figure = Figure(figsize=(9, 4.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    drawing.style(axes)
    yield axes
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    _legend(figure, axes, columns=4)
    drawing.save(figure, file)


def _legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """A legend above the picture: a study may have more arms than fit beside its lines."""
    style = {"ncols": columns, "frameon": False, "labelcolor": INK, "fontsize": 9}
    handles = axes.get_legend_handles_labels()[0]
    figure.legend(handles=handles, loc="outside upper left", **style)
