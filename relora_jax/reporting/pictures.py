"""The report's pictures: each function draws one PNG from plain numbers. No pyplot, no global state."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullLocator

INK, GREY, FAINT = "#24313d", "#7b8794", "#dfe4e9"
BLUE, ORANGE, GREEN = "#2b6cb0", "#d9702c", "#2f8f6b"
MOST_MARKS = 40  # more restarts than this are drawn without lines that would hide the curve

# For runs beside each other: told apart by those who see few colours (Okabe and Ito), then by dashes
SAFE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKS = "osD^vP*"

Points = Sequence[tuple[float, float]]  # (updates or tokens, value)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What every curve over updates is marked with."""

    warm_start_updates: int  # 0: the run has none
    restarts: Sequence[int]  # updates that began with a reset


@dataclasses.dataclass(frozen=True)
class Curves:
    """A run beside others, over tokens seen."""

    name: str
    loss: Points
    perplexity: Points


def loss(file: Path, train: Points, evaluations: Points, timeline: Timeline) -> None:
    """Training loss, raw and smoothed, and validation loss, in nats per token."""
    figure, axes = _curve("loss (nats per token)")
    updates, raw = _arrays(train)
    smooth = smoothed(raw)
    if smooth is raw:
        axes.plot(updates, raw, color=BLUE, linewidth=1.8, label="training", marker=_dot(updates))
    else:
        axes.plot(updates, raw, color=BLUE, linewidth=0.8, alpha=0.3)
        axes.plot(updates, smooth, color=BLUE, linewidth=1.8, label="training (faint: before smoothing)")
    if evaluations:
        at, values = _arrays(evaluations)
        axes.plot(at, values, "o", color=ORANGE, markersize=6, label="validation", **_EDGE)
    _finish(figure, axes, file, timeline)


def learning_rate(file: Path, train: Points, timeline: Timeline) -> None:
    """The learning rate that each logged update had."""
    updates, values = _arrays(train)
    power = int(np.floor(np.log10(values.max() * 1.05))) if values.max() > 0 else 0
    figure, axes = _curve(rf"learning rate ($\times\,10^{{{power}}}$)", height=2.9)
    axes.plot(
        updates, values / 10.0**power, color=GREEN, linewidth=1.8, label="learning rate", marker=_dot(updates)
    )
    axes.set_ylim(bottom=0)
    _finish(figure, axes, file, timeline)


def perplexity(file: Path, evaluations: Points, unigram: float | None, timeline: Timeline) -> None:
    """Validation perplexity beside the unigram distribution's, on a log scale."""
    figure, axes = _curve("validation perplexity (log scale)", height=3.4)
    updates, values = _arrays(evaluations)
    axes.plot(updates, values, "o-", color=ORANGE, markersize=6, linewidth=1.5, label="this run", **_EDGE)
    _log(axes)
    if unigram is not None:
        axes.axhline(unigram, color=GREY, linestyle="--", linewidth=1.2, label=f"unigram: {unigram:,.0f}")
    low, high = min(*values, unigram or np.inf), max(*values, unigram or 0)
    axes.set_ylim(low / 1.35, high * 1.35)
    last = (int(updates[-1]), float(values[-1]))
    axes.annotate(f"{last[1]:,.1f}", last, (0, 9), textcoords="offset points", ha="center", color=INK)
    _finish(figure, axes, file, timeline)


def spectrum(
    file: Path,
    spectra: Mapping[str, Float[np.ndarray, "layers side"]],
    *,
    ranks: Mapping[str, int],
    merges: int,
    rounding: Mapping[str, float],
) -> None:
    """One panel per kind of kernel: singular values by index, a thin line per layer, their median bold.

    Marked are the rank r of one low-rank update (0: kernels of this kind were trained in full) and the most
    that it and those merged before can have together. Values below `rounding` are rounding: they lie outside.
    """
    figure = Figure(figsize=(11, 5.4), dpi=120, layout="constrained")
    grid = figure.subplots(2, 4, sharey=True)
    top = max(float(values.max()) for values in spectra.values())
    bottom = min(max(*rounding.values(), top * 1e-6), 0.02)  # the line at 0.1 is always in the picture
    for axes, (kind, values) in zip(grid.flat, spectra.items(), strict=False):
        _panel(axes, kind, values, rank=ranks[kind], merges=merges)
        axes.set_ylim(bottom, max(top, 0.1) * 2)
    for axes in grid[:, 0]:
        axes.set_ylabel("singular value (log scale)", color=INK)
    for axes in (*grid[1, :3], grid[0, 3]):
        axes.set_xlabel("index, largest first", color=INK)
    _key(grid[1, 3], list(grid.flat[: len(spectra)]))
    _save(figure, file)


def runs(file: Path, curves: Sequence[Curves], starts: Mapping[str, float]) -> None:
    """Validation perplexity above, smoothed training loss below, a colour and a mark for each run.

    `starts`: what is written at a vertical line, and the tokens at which it stands.
    """
    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for n, run in enumerate(curves):
        line = {"color": SAFE[n % 7], "linestyle": DASHES[n // 7 % 4], "linewidth": 1.6, "label": run.name}
        tokens, values = _arrays(run.perplexity)
        above.plot(tokens, values, marker=MARKS[n % 7], markersize=6, **line, **_EDGE)
        tokens, values = _arrays(run.loss)
        below.plot(tokens, smoothed(values), marker=_dot(tokens), **line)
    for n, (label, tokens) in enumerate(starts.items()):
        for axes in (above, below):
            axes.axvline(tokens, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
        side = -1 if tokens > np.mean(above.get_xlim()) else 1
        at = {"xytext": (4 * side, -10 - 12 * n), "ha": "left" if side > 0 else "right"}
        above.annotate(label, (tokens, 1), xycoords=above.get_xaxis_transform(), **at, **_WRITTEN)
    _style(above)
    _style(below)
    _log(above)
    above.set_ylabel("validation perplexity (log scale)", color=INK)
    below.set_ylabel("training loss (nats per token, smoothed)", color=INK)
    below.set_xlabel("tokens seen", color=INK)
    below.xaxis.set_major_formatter(EngFormatter(sep=""))
    key = {"handles": above.get_legend_handles_labels()[0], "labelcolor": INK, "fontsize": 9}
    figure.legend(loc="outside upper left", ncols=3, frameon=False, **key)
    _save(figure, file)


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean over a centred window of a fiftieth of the curve, narrower at its ends; short curves stay."""
    half = len(values) // 100
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(half, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


_WRITTEN = {"textcoords": "offset points", "color": INK, "fontsize": 8}
_EDGE = {"markeredgecolor": "white", "markeredgewidth": 1.0}


def _panel(axes: Axes, kind: str, values: np.ndarray, *, rank: int, merges: int) -> None:
    _style(axes)
    index = np.arange(1, values.shape[1] + 1)
    shown = np.where(values > 0, values, np.nan)
    for layer in shown:
        axes.plot(index, layer, color=BLUE, linewidth=0.8, alpha=0.35, label="one layer")
    axes.plot(index, np.median(values, axis=0), color=INK, linewidth=1.8, label="median of the layers")
    axes.axhline(0.1, color=GREY, linestyle=":", linewidth=1.2, label="0.1")
    if rank:
        axes.axvline(rank, color=ORANGE, linewidth=1.6, label=f"r = {rank}: one low-rank update")
        reach = rank * (merges + 1)
        if rank < reach < values.shape[1]:
            text = f"{reach}: {merges + 1} of them together"
            axes.axvline(reach, color=ORANGE, linewidth=1.4, linestyle="--", label=text)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, values.shape[1] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(kind, loc="left", fontsize=11, fontweight="bold", color=INK)


def _key(axes: Axes, panels: Sequence[Axes]) -> None:
    """One key for all panels, in place of the eighth."""
    axes.set_axis_off()
    lines = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    key = axes.legend(lines.values(), lines.keys(), loc="center", frameon=False, labelcolor=INK, fontsize=9)
    key.set_in_layout(False)  # else the whole column grows as wide as the longest line


def _curve(label: str, *, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _style(axes)
    axes.set_ylabel(label, color=INK)
    axes.set_xlabel("updates", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.margins(x=0.02)
    return figure, axes


def _style(axes: Axes) -> None:
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=GREY, labelcolor=INK, labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _finish(figure: Figure, axes: Axes, file: Path, timeline: Timeline) -> None:
    """Marks the warm start and the restarts, then the key above the curve, where it hides nothing."""
    if timeline.warm_start_updates:
        label = "warm start (full-rank)"
        axes.axvspan(
            0, timeline.warm_start_updates, color=FAINT, alpha=0.6, linewidth=0, zorder=0, label=label
        )
    width = 1.0 if len(timeline.restarts) <= MOST_MARKS else 0.3
    for n, update in enumerate(timeline.restarts):
        label = None if n else f"restart ({len(timeline.restarts)})"
        axes.axvline(update, color=ORANGE, linewidth=width, alpha=0.55, zorder=1, label=label)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, fontsize=9, labelcolor=INK,
        borderaxespad=0.2, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
    _save(figure, file)


def _save(figure: Figure, file: Path) -> None:
    FigureCanvasAgg(figure).print_png(file)


def _arrays(points: Points) -> tuple[np.ndarray, np.ndarray]:
    pairs = np.asarray(points, np.float64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def _dot(values: np.ndarray) -> str:
    return "o" if len(values) == 1 else ""
