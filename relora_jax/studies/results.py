"""What the runs of a study say, as plain numbers: the best rate of each arm, perplexity, differences, curves.

Losses are in nats per token at the end of a run, perplexity is exp of their mean over seeds. Differences are
between runs of the same seed, with a 95% confidence interval of Student's t.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from relora_jax import shapes
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.run import record
from relora_jax.studies import grid
from relora_jax.studies.grid import Losses, Run, Study

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Difference:
    """Mean difference in nats to the reference over pairs of runs; the half-width of its interval."""

    mean: float
    half_width: float  # NaN for a single pair
    pairs: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half_width


@dataclasses.dataclass(frozen=True)
class ArmResult:
    """One arm: the perplexity of each rate at seed 0, and at the best rate, that of all its seeds."""

    name: str
    by_rate: dict[float, float]  # perplexity, infinite if it diverged
    best_rate: float | None  # None: every rate diverged, or some are missing
    losses: tuple[float, ...]  # at the best rate, by seed
    difference: Difference | None
    curve: tuple["Point", ...]  # of seed 0 at the best rate

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite if a seed diverged."""
        return exp(statistics.mean(self.losses)) if self.losses else math.nan

    @property
    def spread(self) -> float:
        """The standard deviation of perplexity over seeds; NaN if one diverged."""
        perplexities = [exp(loss) for loss in self.losses]
        is_finite = len(perplexities) > 1 and all(map(math.isfinite, perplexities))
        return statistics.stdev(perplexities) if is_finite else math.nan


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation: what the run had used until then."""

    tokens: float
    flops: float  # of the model's matrix products
    seconds: float
    loss: float


def paired(losses: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """{seed: loss} minus those of the reference, seed by seed; None without a finite pair."""
    pairs = [losses[seed] - reference[seed] for seed in losses.keys() & reference.keys()]
    pairs = [pair for pair in pairs if math.isfinite(pair)]
    if not pairs:
        return None
    n, half_width = len(pairs), math.nan
    if n > 1:
        from scipy import stats  # here: slow to import

        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
        half_width = quantile * statistics.stdev(pairs) / math.sqrt(n)
    return Difference(statistics.mean(pairs), half_width, n)


def of_arms(study: Study, folder: Path, losses: Losses, *, extend: bool) -> dict[str, ArmResult]:
    """The result of each arm that has at least one run."""
    best = {name: grid.best(study, name, losses, extend=extend) for name in study.arms}
    at_best = {name: _by_seed(name, rate, losses) for name, rate in best.items() if rate}
    results = {}
    for name in study.arms:
        by_rate = {run.rate: exp(loss) for run, loss in losses.items() if run.arm == name and run.seed == 0}
        if not by_rate:
            continue
        rate, own = best[name], at_best.get(name, {})
        compared = grid.reference_of(study, name)
        difference = None if name == compared else paired(own, at_best.get(compared, {}))
        curve = tuple(curve_of(folder / Run(name, rate, 0).name)) if rate else ()
        results[name] = ArmResult(
            name, dict(sorted(by_rate.items())), rate, tuple(own.values()), difference, curve
        )
    return results


def curve_of(workdir: Path) -> list[Point]:
    """The evaluations of a run, with those of its warm start if it was trained elsewhere."""
    run = record.read(workdir)
    points, start, offset_s = list[Point](), 0, 0.0
    if run.config.train.init_from and run.low_rank_start:
        start, source = run.low_rank_start, Path(run.config.train.init_from)
        source = source if source.is_dir() else workdir.with_name(source.name)  # the study was moved
        limit = start * tokens(run.config)
        points = [point for point in curve_of(source) if point.tokens <= limit]
        offset_s = elapsed_s(record.read(source), start)
    for update, loss in run.points("eval", "loss"):
        if update > start or not start:
            seconds = offset_s + elapsed_s(run, update)
            points.append(Point(update * tokens(run.config), flops(run.config, update), seconds, loss))
    return points


def elapsed_s(run: record.Run, update: int) -> float:
    """Seconds in which a run did its updates up to this one, as its train rows say."""
    times = [(0, 0.0), *((row["update"], row["elapsed_s"]) for row in run.of("train"))]
    at, seconds = zip(*times, strict=True)
    return float(np.interp(update, at, seconds))


def tokens(config: Config) -> int:
    """Tokens of an update."""
    return config.train.batch * config.data.sequence_length


def flops(config: Config, update: int) -> float:
    """FLOPs of the model's matrix products in the first updates."""
    warm = min(update, config.low_rank_start) if config.arm in LOW_RANK_ARMS else update
    each = [shapes.matmul_flops_per_token(config, low_rank=low) for low in (False, True)]
    return tokens(config) * (warm * each[0] + (update - warm) * each[1])


def reached(curve: Sequence[Point], loss: float, key: str) -> float | None:
    """How much of `key` (tokens, flops, seconds) the curve had used when it first was at `loss`; None: never.

    Linear between evaluations.
    """
    before = None
    for point in curve:
        if point.loss <= loss:
            if before is None or before.loss == point.loss:
                return getattr(point, key)
            share = (before.loss - loss) / (before.loss - point.loss)
            return getattr(before, key) + share * (getattr(point, key) - getattr(before, key))
        before = point
    return None


def as_json(results: dict[str, ArmResult]) -> dict[str, Any]:
    """The results as JSON has them."""
    table = {}
    for name, arm in results.items():
        values = dataclasses.asdict(arm) | {"perplexity": arm.perplexity, "spread": arm.spread}
        values["by_rate"] = {f"{rate:g}": perplexity for rate, perplexity in arm.by_rate.items()}
        table[name] = values
    return table


def _by_seed(name: str, rate: float, losses: Losses) -> dict[int, float]:
    """{seed: loss} of an arm at a rate, in the order of seeds."""
    return dict(
        sorted((run.seed, loss) for run, loss in losses.items() if (run.arm, run.rate) == (name, rate))
    )


def exp(loss: float) -> float:
    """The perplexity of a loss; infinite where a float cannot have it."""
    return math.exp(loss) if loss < math.log(1e300) else math.inf
