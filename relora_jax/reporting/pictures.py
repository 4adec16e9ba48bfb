"""The pictures of reports: each function draws one PNG from plain numbers, without pyplot or global state."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullLocator

from relora_jax.reporting import drawing
from relora_jax.reporting.drawing import (
    BLUE,
    COLORS,
    DASHES,
    FAINT,
    GREEN,
    GREY,
    INK,
    MARKERS,
    ORANGE,
    Points,
)
from relora_jax.storage.location import AnyPath

MAX_THICK_LINES = 40  # more restarts are drawn as thin lines, which do not hide the curve


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What is marked in every picture over updates."""

    warm_start_updates: int  # 0: no warm start
    restarts: Sequence[int]  # updates that began with a reset


@dataclasses.dataclass(frozen=True)
class Curves:
    """One run of a comparison, over tokens seen."""

    name: str
    loss: Points
    perplexity: Points


def loss(file: AnyPath, train: Points, evaluations: Points, timeline: Timeline) -> None:
    """Draws the training loss, raw and smoothed, and the validation loss, in nats per token."""
    figure, axes = _curve("loss (nats per token)")
    updates, raw = drawing.arrays(train)
    smooth = smoothed(raw)
    if smooth is raw:
        axes.plot(updates, raw, color=BLUE, linewidth=1.8, label="training", marker=_marker(updates))
    else:
        axes.plot(updates, raw, color=BLUE, linewidth=0.8, alpha=0.3)
        axes.plot(updates, smooth, color=BLUE, linewidth=1.8, label="training (faint: unsmoothed)")
    if evaluations:
        updates, values = drawing.arrays(evaluations)
        axes.plot(updates, values, "o", color=ORANGE, markersize=6, label="validation", **_MARKER_EDGE)
    _finish(figure, axes, file, timeline)


def learning_rate(file: AnyPath, rates: Sequence[float], timeline: Timeline) -> None:
    """Draws the learning rate of updates 0, 1, 2, ..."""
    updates, values = np.arange(len(rates)), np.asarray(rates)
    power = int(np.floor(np.log10(values.max() * 1.05))) if values.max() > 0 else 0
    figure, axes = _curve(rf"learning rate ($\times\,10^{{{power}}}$)", height=2.9)
    scaled = values / 10.0**power
    axes.plot(updates, scaled, color=GREEN, linewidth=1.8, label="learning rate", marker=_marker(updates))
    axes.set_ylim(bottom=0)
    _finish(figure, axes, file, timeline)


def perplexity(file: AnyPath, evaluations: Points, unigram: float | None, timeline: Timeline) -> None:
    """Draws the validation perplexity and that of the unigram distribution, on a log scale."""
    figure, axes = _curve("validation perplexity (log scale)", height=3.4)
    updates, values = drawing.arrays(evaluations)
    axes.plot(
        updates, values, "o-", color=ORANGE, markersize=6, linewidth=1.5, label="this run", **_MARKER_EDGE
    )
    drawing.log_scale(axes)
    if unigram is not None:
        axes.axhline(unigram, color=GREY, linestyle="--", linewidth=1.2, label=f"unigram: {unigram:,.0f}")
    low, high = min(*values, unigram or np.inf), max(*values, unigram or 0)
    axes.set_ylim(low / 1.35, high * 1.35)
    last = (int(updates[-1]), float(values[-1]))
    axes.annotate(f"{last[1]:,.1f}", last, (0, 9), textcoords="offset points", ha="center", color=INK)
    _finish(figure, axes, file, timeline)


def spectrum(
    file: AnyPath,
    spectra: Mapping[str, Float[np.ndarray, "layers side"]],
    *,
    ranks: Mapping[str, int],
    merges: int,
    rounding: Mapping[str, float],
) -> None:
    """Draws singular values by index, a panel per kind of kernel, a thin line per layer and a bold median.

    Vertical lines mark the rank r of one low-rank update (0: trained in full) and the largest possible
    rank of its sum with those merged before. Values below `rounding` are only rounding and are not shown.
    """
    figure = Figure(figsize=(11, 5.4), dpi=120, layout="constrained")
    grid = figure.subplots(2, 4, sharey=True)
    top = max(float(values.max()) for values in spectra.values())
    bottom = min(max(*rounding.values(), top * 1e-6), 0.02)  # keeps the line at 0.1 in the picture
    for axes, (kind, values) in zip(grid.flat, spectra.items(), strict=False):
        _panel(axes, kind, values, rank=ranks[kind], merges=merges)
        axes.set_ylim(bottom, max(top, 0.1) * 2)
    for axes in grid[:, 0]:
        axes.set_ylabel("singular value (log scale)", color=INK)
    for axes in (*grid[1, :3], grid[0, 3]):
        axes.set_xlabel("index, largest first", color=INK)
    _shared_legend(grid[1, 3], list(grid.flat[: len(spectra)]))
    drawing.save(figure, file)


def runs(file: AnyPath, curves: Sequence[Curves], starts: Mapping[str, float]) -> None:
    """Draws validation perplexity above smoothed training loss, with a color and a marker for each run.

    `starts` maps the label of each vertical line to its position in tokens.
    """
    figure = Figure(figsize=(10, 8), dpi=120, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for n, run in enumerate(curves):
        line = {"label": run.name, **drawing.line(n)}
        tokens, values = drawing.arrays(run.perplexity)
        upper.plot(tokens, values, marker=MARKERS[n % 7], markersize=6, **line, **_MARKER_EDGE)
        tokens, values = drawing.arrays(run.loss)
        lower.plot(tokens, smoothed(values), marker=_marker(tokens), **line)
    for n, (label, tokens) in enumerate(starts.items()):
        for axes in (upper, lower):
            axes.axvline(tokens, color=GREY, linewidth=1.2, linestyle="--", zorder=1)
        side = -1 if tokens > np.mean(upper.get_xlim()) else 1
        offset = {"xytext": (4 * side, -10 - 12 * n), "ha": "left" if side > 0 else "right"}
        upper.annotate(label, (tokens, 1), xycoords=upper.get_xaxis_transform(), **offset, **_LABEL)
    drawing.style(upper)
    drawing.style(lower)
    drawing.log_scale(upper)
    upper.set_ylabel("validation perplexity (log scale)", color=INK)
    lower.set_ylabel("training loss (nats per token, smoothed)", color=INK)
    lower.set_xlabel("tokens seen", color=INK)
    lower.xaxis.set_major_formatter(EngFormatter(sep=""))
    legend = {"handles": upper.get_legend_handles_labels()[0], "labelcolor": INK, "fontsize": 9}
    figure.legend(loc="outside upper left", ncols=3, frameon=False, **legend)
    drawing.save(figure, file)


def restarts(file: AnyPath, rows: Sequence[Mapping[str, Any]], spikes: Mapping[int, float]) -> None:
    """Draws four facts of each `restart` row over updates, and the height of the loss spikes after them."""
    figure = Figure(figsize=(11, 5.2), dpi=120, layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)

    def panel(axes: Axes, label: str, **lines: Sequence[float | None]) -> None:
        for (name, values), color in zip(lines.items(), (BLUE, ORANGE), strict=False):
            updates = [row["update"] for row in rows]
            axes.plot(
                updates,
                [np.nan if value is None else value for value in values],
                "o-",
                color=color,
                markersize=4,
                linewidth=1.4,
                label=name.replace("_", " "),
            )
        drawing.style(axes)
        axes.set_ylabel(label, color=INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)

    def of(key: str) -> list[float | None]:
        return [row[key] for row in rows]

    changes = [row["logits_change"] / row["logits_rms"] for row in rows]
    panel(panels[0, 0], "relative to the RMS", change_of_logits=changes, base_rounding=of("base_rounding"))
    panel(panels[0, 1], "merged update", norm=of("delta_norm"), effective_rank=of("effective_rank"))
    panel(panels[1, 0], "overlap with the one before", inputs=of("overlap_in"), outputs=of("overlap_out"))
    panel(panels[1, 1], "loss spike (nats)", height=[spikes.get(row["update"]) for row in rows])
    for axes in panels[1]:
        axes.set_xlabel("updates", color=INK)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    for axes in panels.flat:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    drawing.save(figure, file)


def loss_lines(
    file: AnyPath, between: Points, around: Mapping[str, Sequence[Points]], *, ends: tuple[str, str]
) -> None:
    """Draws the loss along the line between two models, and along each model's random directions."""
    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    t, losses = drawing.arrays(between)
    left.plot(t, losses, color=INK, linewidth=1.6)
    for at, name, color in zip((0, 1), ends, COLORS, strict=False):
        left.axvline(at, color=color, linewidth=1.4, linestyle="--", label=name)
    left.set_xlabel("t of (1 - t) first + t second", color=INK)
    for name, color in zip(ends, COLORS, strict=False):
        for n, points in enumerate(around[name]):
            s, losses = drawing.arrays(points)
            style = {"color": color, "linestyle": DASHES[n % 4], "linewidth": 1.6}
            right.plot(s, losses, label=f"{name}, direction {n + 1}", **style)
    right.set_xlabel("s of weights + s direction", color=INK)
    for axes in (left, right):
        drawing.style(axes)
        axes.set_ylabel("loss (nats per token)", color=INK)
        axes.legend(frameon=False, labelcolor=INK, fontsize=8)
    drawing.save(figure, file)


def spectra_of_two(
    file: AnyPath, spectra: Mapping[str, Mapping[str, Float[np.ndarray, "layers side"]]]
) -> None:
    """Draws the singular values of {run: {kind: values}}: a panel per kind, a line per layer and run."""
    figure = Figure(figsize=(11, 5.4), dpi=120, layout="constrained")
    grid = figure.subplots(2, 4, sharey=True)
    for (run, kinds), color in zip(spectra.items(), COLORS, strict=False):
        for axes, (kind, values) in zip(grid.flat, kinds.items(), strict=False):
            index = np.arange(1, values.shape[1] + 1)
            for layer in np.where(values > 0, values, np.nan):
                axes.plot(index, layer, color=color, linewidth=0.8, alpha=0.35)
            axes.plot(index, np.median(values, axis=0), color=color, linewidth=1.8, label=run)
            axes.set_title(kind, loc="left", fontsize=11, fontweight="bold", color=INK)
            drawing.style(axes)
            axes.set_yscale("log")
    top = max(float(values.max()) for kinds in spectra.values() for values in kinds.values())
    grid[0, 0].set_ylim(max(top, 1e-12) * 1e-5, max(top, 1e-12) * 2)
    for axes in grid[:, 0]:
        axes.set_ylabel("singular value (log scale)", color=INK)
    for axes in (*grid[1, :3], grid[0, 3]):
        axes.set_xlabel("index, largest first", color=INK)
    _shared_legend(grid[1, 3], list(grid.flat[:7]))
    drawing.save(figure, file)


def cka(file: AnyPath, values: Float[np.ndarray, "layers layers"], *, names: tuple[str, str]) -> None:
    """Draws the similarity of each layer of the first run (rows) with each of the second."""
    figure = Figure(figsize=(5.4, 4.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    sides = [side + 0.5 for side in values.shape]
    image = axes.imshow(
        values, vmin=0, vmax=1, origin="lower", cmap="cividis", extent=(0.5, sides[1], 0.5, sides[0])
    )
    figure.colorbar(image, label="linear CKA")
    for axis, name in ((axes.yaxis, names[0]), (axes.xaxis, names[1])):
        axis.set_major_locator(MaxNLocator(8, integer=True))
        axis.set_label_text(f"layer of {name}", color=INK)
    drawing.save(figure, file)


def memory(file: AnyPath, parts: Mapping[str, Mapping[str, float]], *, limit: float) -> None:
    """Draws one bar of GB for each arm, split by purpose, and a line where a device's memory ends."""
    figure = Figure(figsize=(9, 1.6 + 0.7 * len(parts)), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    _stacked(axes, parts, unit=1e9)
    axes.axvline(limit / 1e9, color=INK, linestyle="--", linewidth=1.4, label="a device's memory")
    axes.invert_yaxis()
    axes.set_xlabel("GB per device", color=INK)
    figure.legend(loc="outside upper left", ncols=5, frameon=False, labelcolor=INK, fontsize=9)
    drawing.save(figure, file)


def causes(
    file: AnyPath, steps: Mapping[str, Mapping[str, float]], memory: Mapping[str, Mapping[str, float]]
) -> None:
    """Draws, for each column, its seconds by cause beside its bytes by purpose."""
    figure = Figure(figsize=(11, 2.2 + 0.45 * len(steps)), dpi=120, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, parts, unit, label in zip(
        panels, (steps, memory), (1e-3, 1e9), ("ms per update, roofline", "GB per device"), strict=True
    ):
        _stacked(axes, parts, unit=unit)
        axes.margins(x=0.15)
        axes.set_xlabel(label, color=INK)
        ncols = 4 if axes is panels[0] else 2
        style = {"ncols": ncols, "frameon": False, "labelcolor": INK, "fontsize": 8}
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), **style)
    panels[0].invert_yaxis()
    drawing.save(figure, file)


def history(
    file: AnyPath, changes: Sequence[str], values: Mapping[str, Sequence[float]], *, label: str
) -> None:
    """Draws what each change made of each row's value, from the first to the last."""
    figure = Figure(figsize=(9, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    drawing.style(axes)
    for (name, steps), color in zip(values.items(), COLORS, strict=False):
        axes.plot(list(changes), list(steps), color=color, marker="o", label=name)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label, color=INK)
    axes.legend(frameon=False, labelcolor=INK)
    drawing.save(figure, file)


def bench(
    file: AnyPath, steps: Mapping[str, tuple[float, float, float]], memory_bytes: Mapping[str, float | None]
) -> None:
    """Draws each column's memory beside its step, {name: (median, first, third quartile) in seconds}."""
    figure = Figure(figsize=(9, 1.4 + 0.45 * len(steps)), dpi=120, layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    medians, low, high = 1e3 * np.array(list(steps.values())).T
    bars = time.barh(list(steps), medians, height=0.6, color=BLUE)
    time.errorbar(
        medians, list(steps), xerr=(medians - low, high - medians), fmt="none", ecolor=INK, capsize=3
    )
    time.set_xlabel("ms per update (whiskers: quartiles)", color=INK)
    sizes = np.array([memory_bytes[name] or np.nan for name in steps]) / 1e9
    memory_bars = memory.barh(list(steps), sizes, height=0.6, color=ORANGE)
    memory.set_xlabel("GB per device, compiled", color=INK)
    for axes, values, patches in ((time, medians, bars), (memory, sizes, memory_bars)):
        drawing.style(axes)
        axes.margins(x=0.15)
        labels = ["" if np.isnan(value) else f"{value:,.3g}" for value in values]
        axes.bar_label(patches, labels, label_type="center", color="white", fontsize=9)
    time.invert_yaxis()
    drawing.save(figure, file)


def _stacked(axes: Axes, parts: Mapping[str, Mapping[str, float]], *, unit: float) -> None:
    """One bar of each row's parts in this unit, one after the other, with their sum; without empty parts."""
    drawing.style(axes)
    starts = np.zeros(len(parts))
    for index, part in enumerate(next(iter(parts.values()))):
        sizes = np.array([split[part] for split in parts.values()]) / unit
        if sizes.any():
            color, hatch = COLORS[index % len(COLORS)], "////" if index >= len(COLORS) else None
            options = {"color": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0}
            axes.barh(list(parts), sizes, left=starts, height=0.6, label=part, **options)
        starts += sizes
    for row, total in enumerate(starts):
        axes.annotate(
            f"{total:,.1f}", (total, row), (4, 0), textcoords="offset points", va="center", color=INK
        )


def smoothed(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Mean over a centered window of 1/50 of the curve, narrower at its ends; below 100 points, unchanged."""
    half = len(values) // 100
    if half == 0:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    width = np.minimum(half, np.minimum(index, len(values) - 1 - index))  # on each side
    return (sums[index + width + 1] - sums[index - width]) / (2 * width + 1)


_LABEL = {"textcoords": "offset points", "color": INK, "fontsize": 8}
_MARKER_EDGE = {"markeredgecolor": "white", "markeredgewidth": 1.0}


def _panel(axes: Axes, kind: str, values: np.ndarray, *, rank: int, merges: int) -> None:
    drawing.style(axes)
    index = np.arange(1, values.shape[1] + 1)
    for layer in np.where(values > 0, values, np.nan):
        axes.plot(index, layer, color=BLUE, linewidth=0.8, alpha=0.35, label="one layer")
    axes.plot(index, np.median(values, axis=0), color=INK, linewidth=1.8, label="median of the layers")
    axes.axhline(0.1, color=GREY, linestyle=":", linewidth=1.2, label="0.1")
    if rank:
        axes.axvline(rank, color=ORANGE, linewidth=1.6, label=f"r = {rank}: one low-rank update")
        bound = rank * (merges + 1)
        if rank < bound < values.shape[1]:
            label = f"{bound}: sum of {merges + 1} updates"
            axes.axvline(bound, color=ORANGE, linewidth=1.4, linestyle="--", label=label)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, values.shape[1] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_title(kind, loc="left", fontsize=11, fontweight="bold", color=INK)


def _shared_legend(axes: Axes, panels: Sequence[Axes]) -> None:
    """One legend for all panels, in place of the eighth."""
    axes.set_axis_off()
    lines = {}
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    legend = axes.legend(
        lines.values(), lines.keys(), loc="center", frameon=False, labelcolor=INK, fontsize=9
    )
    legend.set_in_layout(False)  # otherwise the whole column becomes as wide as the longest label


def _curve(label: str, *, height: float = 4.2) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    drawing.style(axes)
    axes.set_ylabel(label, color=INK)
    axes.set_xlabel("updates", color=INK)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.margins(x=0.02)
    return figure, axes


def _finish(figure: Figure, axes: Axes, file: AnyPath, timeline: Timeline) -> None:
    """Marks the warm start and the restarts, adds a legend above the axes and saves the figure."""
    if timeline.warm_start_updates:
        style = {"color": FAINT, "alpha": 0.6, "linewidth": 0, "zorder": 0}
        axes.axvspan(0, timeline.warm_start_updates, label="warm start (full-rank)", **style)
    width = 1.0 if len(timeline.restarts) <= MAX_THICK_LINES else 0.3
    for n, update in enumerate(timeline.restarts):
        label = None if n else f"restart ({len(timeline.restarts)})"
        axes.axvline(update, color=ORANGE, linewidth=width, alpha=0.55, zorder=1, label=label)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, fontsize=9, labelcolor=INK,
        borderaxespad=0.2, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
    drawing.save(figure, file)


def _marker(values: np.ndarray) -> str:
    return "o" if len(values) == 1 else ""
