"""Writes a study's report: NAME.md with pictures, the same as one HTML file, and NAME.json."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from relora_jax import shapes
from relora_jax.config import to_json
from relora_jax.core.grammar import Choice
from relora_jax.errors import UserError
from relora_jax.planning.compiled import Memory
from relora_jax.reporting import html, spectrum
from relora_jax.run import record
from relora_jax.run.directory import PACKAGES
from relora_jax.run.format import number, strict_json
from relora_jax.storage import atomic
from relora_jax.studies import grid, pictures, results
from relora_jax.studies.grid import Arm, Losses, Run, Study
from relora_jax.studies.memory import memory
from relora_jax.studies.results import ArmResult, Difference
from relora_jax.training import ledger

NOTES = """\
Each arm at the best of its learning rates, tuned with seed 0. Perplexity is exp of the mean validation loss
over seeds, with its standard deviation. The difference is between runs of one seed, which start from the same
weights and read the same batches, in nats per token with a 95% interval (Student's t): below 0 is better,
and bold if the interval excludes 0.
"""
PAIRS = """\
The row's loss minus the column's, in nats per token, over the seeds that both have: below 0, the row is
better.
"""
SOONER = """\
What the arm needed to reach the final loss of the worse of the two, itself or its reference, relative to what
the reference needed: below 1 is sooner. FLOPs are those of the model's matrix products. Runs side by side
share the machine, so that seconds are rough. One seed.
"""

GAPS = """\
Mean loss above that of the full-rank arm of the same size, in nats, with a 95% interval.
"""
MEMORY = """\
MB that the updates of an arm's last phase need on one device: weights, moments and gradients from shapes, and
what its program needs besides, as compiled for this machine; relative to the full-rank arm. Recomputed:
the total if the backward pass computes the blocks again (model.remat=full). The warm start is in full rank.
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

    def file(name: str) -> Path:
        return folder / f"{study.name}_{name}.png"

    def image(name: str, title: str) -> str:
        return f"![{title}]({quote(file(name).name)})\n"

    parts = [
        f"# Study {study.name}\n",
        f"{len(losses)} runs of {updates:,} updates, {updates * results.tokens(study.base):,} tokens each.\n",
        "## Arms\n",
        _table(study, arms),
        NOTES,
        *_pairs(arms),
        "## Learning rates\n",
        _rates(study, arms, extend=extend, losses=losses),
    ]
    drawn = {name: arm for name, arm in arms.items() if len(arm.curve) > 1}
    if drawn:
        pictures.curves(file("curves"), {n: _points(arm) for n, arm in drawn.items()})
        pictures.rates(file("rates"), {name: arm.by_rate for name, arm in arms.items()})
        parts += ["\n" + image("rates", "Perplexity by learning rate"), "## Curves\n"]
        parts += [image("curves", "Perplexity over tokens, FLOPs and seconds")]
    if any(grid.reference_of(study, name) in drawn for name in drawn):
        parts += ["## Sooner or later\n", _sooner(study, drawn), SOONER]
    if gaps := _gaps(study, arms):
        pictures.gaps(file("gaps"), gaps)
        parts += ["## Gap by size\n", _gap_table(gaps), GAPS, image("gaps", "Gap to full rank by size")]
    configs = {name: grid.config(study, _run(arm), folder) for name, arm in arms.items()}
    kept = {name: memory(config) for name, config in configs.items()}
    recomputed = {name: memory(config, remat="full") for name, config in configs.items()}
    parts += ["\n## Memory\n", _memory(study, arms, kept, recomputed), MEMORY]
    moved = {}
    for name in [name for name, arm in arms.items() if arm.best_rate]:
        run = record.read(folder / _run(arms[name]).name)
        with contextlib.suppress(UserError):  # a checkpoint is missing, as of a run that diverged
            moved[name] = spectrum.of_run(run, *spectrum.checkpoints(run)[:2])
    if moved:
        pictures.spectra(file("spectra"), {name: values[KIND] for name, values in moved.items()})
        parts += ["## Summed update\n", _moved(moved), MOVED, image("spectra", "Singular values")]
    text = "\n".join(parts)
    content = {"study": study.name, "runs": len(losses), "updates": updates, "arms": results.as_json(arms)}
    content |= {"base": json.loads(to_json(study.base))}
    content |= {"settings": {name: settings(study.arms[name]) for name in arms}}
    content |= {"parameters": {name: _parameters(study, arm) for name, arm in arms.items()}}
    for key, splits in (("bytes", kept), ("bytes_recomputed", recomputed)):
        content[key] = {name: split._asdict() for name, split in splits.items()}
    content |= {"versions": {name: version(name) for name in PACKAGES}}
    report = folder / f"{study.name}.md"
    atomic.write(report.with_suffix(".json"), strict_json(content).encode())
    html.write(report.with_suffix(".html"), text)
    atomic.write(report, text.encode())
    return report


def settings(arm: Arm) -> dict[str, Any]:
    """What an arm has of its own, as JSON has it."""
    own = {key: str(value) if isinstance(value, Choice) else value for key, value in arm.settings.items()}
    return {"arm": arm.arm, "rates": list(arm.rates), **own}


def markdown(rows: Sequence[Sequence[str]], *, names: int = 1) -> str:
    """A table: the first row is its head, and all but the first `names` columns are aligned to the right."""
    rule = ("---",) * names + ("---:",) * (len(rows[0]) - names)
    return "".join(f"| {' | '.join(row)} |\n" for row in (rows[0], rule, *rows[1:]))


def _table(study: Study, arms: Mapping[str, ArmResult]) -> str:
    against = "the full-rank arm" if any(arm.reference for arm in study.arms.values()) else study.reference
    rows = [("arm", "rate", "seeds", "perplexity", f"nats vs. {against}")]
    for name, arm in arms.items():
        rate = "-" if arm.best_rate is None else f"{arm.best_rate:g}"
        spread = "" if math.isnan(arm.spread) else f" ± {arm.spread:,.1f}"
        perplexity = f"{arm.perplexity:,.1f}{spread}" if arm.losses else "-"
        rows.append((name, rate, str(len(arm.losses)), perplexity, _nats(arm.difference)))
    return markdown(rows)


def _pairs(arms: Mapping[str, ArmResult]) -> list[str]:
    """The section with the difference of each two arms that have two seeds in common."""
    several = {name: dict(enumerate(arm.losses)) for name, arm in arms.items() if len(arm.losses) > 1}
    if len(several) < 3:
        return []
    rows = [("arm", *list(several)[:-1])]
    for n, (name, losses) in enumerate(several.items()):
        cells = [_nats(results.paired(losses, other)) for other in list(several.values())[:n]]
        rows.append((name, *cells, *[""] * (len(several) - 1 - n)))
    return ["## Pairs\n", markdown([rows[0], *rows[2:]]), PAIRS]


def _gaps(study: Study, arms: Mapping[str, ArmResult]) -> dict[str, dict[int, Difference]]:
    """{method: {parameters of the full-rank model: difference}} of the methods with arms METHOD@SIZE."""
    gaps: dict[str, dict[int, Difference]] = {}
    for name, arm in arms.items():
        method = name.partition("@")[0]
        if arm.difference and any(other.startswith(f"{method}@") for other in arms):
            gaps.setdefault(method, {})[_parameters(study, arm)] = arm.difference
    return gaps


def _parameters(study: Study, arm: ArmResult) -> int:
    """Those of the full-rank model."""
    return shapes.parameters(grid.config(study, _run(arm), Path()).model)


def _gap_table(gaps: Mapping[str, Mapping[int, Difference]]) -> str:
    sizes = sorted({size for of in gaps.values() for size in of})
    rows = [("method", *(f"{size / 1e6:,.2f}M" for size in sizes))]
    for method, of in gaps.items():
        rows.append((method, *(_nats(of[size]) if size in of else "-" for size in sizes)))
    return markdown(rows)


def _run(arm: ArmResult) -> Run:
    """That of seed 0, at the best rate if it is known."""
    return Run(arm.name, arm.best_rate or next(iter(arm.by_rate)), 0)


def _memory(
    study: Study, arms: Mapping[str, ArmResult], kept: Mapping[str, Memory], recomputed: Mapping[str, Memory]
) -> str:
    head = ("arm", "perplexity", *Memory._fields, "total", "relative", "recomputed", "relative")
    rows: list[Sequence[str]] = [head]
    for name, split in kept.items():
        row = [name, f"{arms[name].perplexity:,.1f}" if arms[name].losses else "-"]
        row += [f"{size / 1e6:,.2f}" for size in split]
        for totals in (kept, recomputed):
            reference = totals.get(grid.reference_of(study, name))
            whole = reference.total if reference else math.nan
            row += [f"{totals[name].total / 1e6:,.2f}", f"{totals[name].total / whole:.2f}"]
        rows.append(row)
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


def _nats(difference: Difference | None) -> str:
    if difference is None:
        return ""
    interval = "" if math.isnan(difference.half_width) else f" ± {difference.half_width:.3f}"
    text = f"{difference.mean:+.3f}{interval}"
    return f"**{text}**" if difference.is_clear else text


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
    for name, arm in arms.items():
        compared = grid.reference_of(study, name)
        if name == compared or compared not in arms:
            continue
        reference = arms[compared].curve
        worse = max(arm.curve[-1].loss, reference[-1].loss)
        cells = []
        for key in ("tokens", "flops", "seconds"):
            ours, theirs = (results.reached(curve, worse, key) for curve in (arm.curve, reference))
            cells.append(f"{ours / theirs:.2f}" if ours and theirs else "-")
        rows.append((name, *cells))
    return markdown(rows)
