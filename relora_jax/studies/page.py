"""Writes a study's report: report.md with pictures, the same as one HTML file, and results.json."""

import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from relora_jax.planning.compiled import Memory
from relora_jax.reporting import html, pictures, spectrum
from relora_jax.run.directory import PACKAGES
from relora_jax.run.format import number
from relora_jax.storage import atomic
from relora_jax.studies import grid, results
from relora_jax.studies.grid import Losses, Run, Study
from relora_jax.studies.memory import memory
from relora_jax.studies.results import ArmResult
from relora_jax.training import ledger

NOTES = """\
Each arm at the best of its learning rates, tuned with seed 0. Perplexity is exp of the mean validation loss
over seeds, with its standard deviation. The difference is between runs of one seed, which start from the same
weights and read the same batches, in nats per token with a 95% interval (Student's t): below 0 is better,
and bold if the interval excludes 0.
"""
SOONER = """\
What the arm needed to reach the final loss of the worse of the two, itself or {reference}, relative to what
{reference} needed: below 1 is sooner. FLOPs are those of the model's matrix products. Runs side by side
share the machine, so that seconds are rough. One seed.
"""

MEMORY = """\
MB that the updates of an arm's last phase need on one device: weights, moments and gradients from shapes, and
what its program needs besides, as compiled for this machine. The warm start is in full rank.
"""
MOVED = """\
Of what training added to the kernels since the start of the low-rank phase, one seed: the norm over all
kernels, the mean effective rank (exp of the entropy of the normalized singular values), and how many singular
values are below 0.1, as in the paper's table. The picture shows the median over the layers of `up`.
"""
KIND = "up"  # of the kernels in the picture of spectra


def write(study: Study, folder: Path, losses: Losses, *, extend: bool) -> Path:
    """Writes the report of the runs that have ended; returns its path."""
    arms = results.of_arms(study, folder, losses, extend=extend)
    updates = study.base.train.updates
    parts = [
        f"# Study {study.name}\n",
        f"{len(losses)} runs of {updates:,} updates, {updates * results.tokens(study.base):,} tokens each.\n",
        "## Arms\n",
        _table(study, arms),
        NOTES,
        "## Learning rates\n",
        _rates(study, arms, extend=extend, losses=losses),
    ]
    drawn = {name: arm for name, arm in arms.items() if len(arm.curve) > 1}
    if drawn:
        pictures.study_curves(folder / "curves.png", {n: _points(arm) for n, arm in drawn.items()})
        pictures.study_rates(folder / "rates.png", {name: arm.by_rate for name, arm in arms.items()})
        parts += ["\n![Perplexity by learning rate](rates.png)\n", "## Curves\n"]
        parts += ["![Perplexity over tokens, FLOPs and seconds](curves.png)\n"]
    if study.reference in drawn:
        parts += ["## Sooner or later\n", _sooner(study, drawn), SOONER.format(reference=study.reference)]
    kept = {name: memory(grid.config(study, _run(arm), folder)) for name, arm in arms.items()}
    parts += ["\n## Memory\n", _memory(study, arms, kept), MEMORY]
    moved = {name: spectrum.of_run(folder / _run(arm).name) for name, arm in arms.items() if arm.best_rate}
    if moved := {name: values for name, values in moved.items() if values}:
        pictures.study_spectra(folder / "spectra.png", {name: values[KIND] for name, values in moved.items()})
        parts += ["## Summed update\n", _moved(moved), MOVED, "![Singular values](spectra.png)\n"]
    text = "\n".join(parts)
    content = {"study": study.name, "runs": len(losses), "updates": updates, "arms": results.as_json(arms)}
    content |= {"bytes": {name: split._asdict() for name, split in kept.items()}}
    content |= {"versions": {name: version(name) for name in PACKAGES}}
    atomic.write(folder / "results.json", f"{json.dumps(content, indent=2)}\n".encode())
    html.write(folder / "report.html", text)
    atomic.write(folder / "report.md", text.encode())
    return folder / "report.md"


def markdown(rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """A table: the first row is its head, and all but the first `names` columns are aligned to the right."""
    rule = ("---",) * names + ("---:",) * (len(rows[0]) - names)
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _table(study: Study, arms: Mapping[str, ArmResult]) -> str:
    rows = [("arm", "rate", "seeds", "perplexity", f"nats vs. {study.reference}")]
    for name, arm in arms.items():
        rate = "-" if arm.best_rate is None else f"{arm.best_rate:g}"
        spread = "" if math.isnan(arm.spread) else f" ± {arm.spread:,.1f}"
        perplexity = f"{arm.perplexity:,.1f}{spread}" if arm.losses else "-"
        rows.append((name, rate, str(len(arm.losses)), perplexity, _difference(arm)))
    return markdown(rows)


def _run(arm: ArmResult) -> Run:
    """That of seed 0, at the best rate if it is known."""
    return Run(arm.name, arm.best_rate or next(iter(arm.by_rate)), 0)


def _memory(study: Study, arms: Mapping[str, ArmResult], kept: Mapping[str, Memory]) -> str:
    head = ("arm", "perplexity", *Memory._fields, "total", f"of {study.reference}")
    rows: list[Sequence[str]] = [head]
    whole = kept[study.reference].total if study.reference in kept else math.nan
    for name, split in kept.items():
        perplexity = f"{arms[name].perplexity:,.1f}" if arms[name].losses else "-"
        sizes = [f"{size / 1e6:,.2f}" for size in (*split, split.total)]
        rows.append((name, perplexity, *sizes, f"{split.total / whole:.2f}"))
    return markdown(rows)


def _moved(moved: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    rows = [("arm", "norm", "effective rank", "values below 0.1")]
    for name, kinds in moved.items():
        norm = math.sqrt(sum(float(np.sum(np.square(values))) for values in kinds.values()))
        rank = float(np.mean([ledger.effective_rank(values) for values in kinds.values()]))
        small = sum(spectrum.below(values) for values in kinds.values())
        count = f"{small:,} of {sum(values.size for values in kinds.values()):,}"
        rows.append((name, f"{norm:,.1f}", f"{rank:,.1f}", count))
    return markdown(rows)


def _difference(arm: ArmResult) -> str:
    if arm.difference is None:
        return ""
    interval = "" if math.isnan(arm.difference.half_width) else f" ± {arm.difference.half_width:.3f}"
    text = f"{arm.difference.mean:+.3f}{interval}"
    return f"**{text}**" if arm.difference.is_clear else text


def _rates(study: Study, arms: Mapping[str, ArmResult], *, extend: bool, losses: Losses) -> str:
    rows = [("arm", "perplexity by rate (seed 0)")]
    edges = grid.edges(study, losses, extend=extend)
    for name, arm in arms.items():
        cells = [
            f"{'**' * (rate == arm.best_rate)}{rate:g}: {number(_finite(value), ',.1f')}"
            f"{'**' * (rate == arm.best_rate)}"
            for rate, value in arm.by_rate.items()
        ]
        edge = " (the best is at the edge)" * (name in edges)
        rows.append((name, f"{', '.join(cells)}{edge}"))
    return markdown(rows, names=2)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _points(arm: ArmResult) -> dict[str, list[tuple[float, float]]]:
    """{what is used: (amount, perplexity) of each evaluation}."""
    keys = {"tokens": "tokens", "FLOPs": "flops", "seconds": "seconds"}
    return {
        label: [(getattr(p, key), results.exp(p.loss)) for p in arm.curve if getattr(p, key) > 0]
        for label, key in keys.items()
    }


def _sooner(study: Study, arms: Mapping[str, ArmResult]) -> str:
    rows = [("arm", "tokens", "FLOPs", "seconds")]
    reference = arms[study.reference].curve
    for name, arm in arms.items():
        if name == study.reference:
            continue
        worse = max(arm.curve[-1].loss, reference[-1].loss)
        cells = []
        for key in ("tokens", "flops", "seconds"):
            ours, theirs = (results.reached(curve, worse, key) for curve in (arm.curve, reference))
            cells.append(f"{ours / theirs:.2f}" if ours and theirs else "-")
        rows.append((name, *cells))
    return markdown(rows)
