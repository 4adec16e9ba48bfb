"""Which runs a study consists of, from the results of those that have ended.

    1. every arm at every rate of its grid, with seed 0
    2. every arm at its best rate, with the other seeds
    3. those arms again, with more seeds, whose mean loss is close to another arm's

Runs of one seed start from the same weights, read the same batches and, if they have a warm start, share it:
it is the first part of the run of the arm `warm_start` at the rate of `base`.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relora_jax.config import LOW_RANK_ARMS, Config, flatten
from relora_jax.errors import UserError
from relora_jax.shapes import parameters
from relora_jax.storage.location import AnyPath

MOST_ADDED = 4  # rates at one edge of a grid


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm of a study: `arm` of a run, the peak rates to try, and settings of its own by dotted key.

    A rate is `relora.peak_lr` of the arms with a low-rank phase, `optimizer.peak_lr` of the others.
    `reference`, for an arm whose model has another size than `base`: the full-rank arm of that size, which it
    is compared with, and which provides its warm start. Such arms are called METHOD@SIZE,
    and the arm METHOD, if there is one, is the same at the size of `base`.
    """

    arm: str
    rates: tuple[float, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reference: str = ""


@dataclasses.dataclass(kw_only=True)
class Study:
    """What a config file of a study returns: the settings that all runs share, and the arms by name.

    Arms whose mean loss is within log(1 + close) of another's get `close_seeds` seeds, the others `seeds`.
    """

    name: str
    base: Config
    arms: dict[str, Arm]
    reference: str = "full"  # what the others are compared with
    warm_start: str = "full"
    seeds: int = 3
    close_seeds: int = 5
    close: float = 0.02


@dataclasses.dataclass(frozen=True)
class Run:
    """One arm at one rate with one seed."""

    arm: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """That of its directory."""
        return f"{self.arm}-{self.rate:g}-{self.seed}"


def reference_of(study: Study, name: str) -> str:
    """The arm that an arm is compared with."""
    return study.arms[name].reference or study.reference


def warm_start_of(study: Study, name: str) -> str:
    """The arm that provides the warm start of an arm."""
    return study.arms[name].reference or study.warm_start


Losses = Mapping[Run, float]  # at the end of each run that has ended; infinite if it diverged


def check(study: Study) -> None:
    """UserError for arms or settings that do not exist, grids of fewer than two rates, and mixed sizes."""
    known = {key for key, _, _ in flatten(study.base)}
    warm_starts = {warm_start_of(study, name) for name in study.arms}
    for name in warm_starts | {reference_of(study, name) for name in study.arms}:
        if name not in study.arms:
            raise UserError(f"the study has no arm {name}: add it, or choose one of {', '.join(study.arms)}")
    for name, arm in study.arms.items():
        if unknown := set(arm.settings) - known:
            raise UserError(f"arm {name}: {min(unknown)} is not a setting (config.py lists them)")
        if len(set(arm.rates)) < 2 or min(arm.rates) <= 0 or list(arm.rates) != sorted(set(arm.rates)):
            raise UserError(f"arm {name}: rates {arm.rates} must be at least two, above 0 and increasing")
    for name in warm_starts:
        warm = study.arms[name]
        optimizer = warm.settings.get("optimizer.name", study.base.optimizer.name)
        if warm.arm in LOW_RANK_ARMS or optimizer != "adamw":
            raise UserError(f"warm_start {name} must be an arm that trains in full rank with adamw")
    for name in study.arms:
        for other in (reference_of(study, name), warm_start_of(study, name)):
            own, its = (parameters(config(study, Run(of, 1.0, 0), Path()).model) for of in (name, other))
            if own != its:
                raise UserError(
                    f"arm {name} has a model of {own:,} parameters, and {other} one of {its:,}: name a "
                    "full-rank arm of its own size as its reference"
                )
    if not 1 <= study.seeds <= study.close_seeds:
        raise UserError(f"seeds {study.seeds} must be from 1 to close_seeds {study.close_seeds}")
    if not 0 <= study.close < math.inf:
        raise UserError(f"close {study.close} must be at least 0, such as 0.02")


def config(study: Study, run: Run, folder: AnyPath) -> Config:
    """The config of a run whose directory is `folder`/run.name."""
    result, arm = copy.deepcopy(study.base), study.arms[run.arm]
    result.name, result.arm = run.name, arm.arm
    for key, value in arm.settings.items():
        *groups, field = key.split(".")
        part: Any = result
        for group in groups:
            part = getattr(part, group)
        setattr(part, field, value)
    if arm.arm in LOW_RANK_ARMS:
        result.relora.peak_lr = run.rate
    else:
        result.optimizer.peak_lr = run.rate
    result.train.seed = run.seed
    result.train.keep_last = 1  # beside the one at the end of the warm start, which every run keeps
    if source := source_of(study, run):
        result.train.init_from = str(folder / source.name)
    return result


def source_of(study: Study, run: Run) -> Run | None:
    """The run that provides the warm start of another; None if that one has no warm start."""
    arm, start = study.arms[run.arm], study.base.relora.warm_start_updates
    start = arm.settings.get("relora.warm_start_updates", start)
    if arm.arm not in LOW_RANK_ARMS or not start:
        return None
    return Run(warm_start_of(study, run.arm), study.base.optimizer.peak_lr, run.seed)


def grid(study: Study, name: str, losses: Losses, *, extend: bool) -> tuple[float, ...]:
    """The rates of an arm; with `extend`, more of them for as long as the best is at an edge."""
    rates = study.arms[name].rates
    for _ in range(MOST_ADDED if extend else 0):
        beyond = _beyond(rates, name, losses)
        if beyond is None:
            break
        rates = tuple(sorted({*rates, beyond}))
    return rates


def best(study: Study, name: str, losses: Losses, *, extend: bool) -> float | None:
    """The rate of an arm with the lowest loss at seed 0; None while one is missing, or if all diverged."""
    by_rate = {rate: losses.get(Run(name, rate, 0)) for rate in grid(study, name, losses, extend=extend)}
    if None in by_rate.values() or not any(map(math.isfinite, filter(None, by_rate.values()))):
        return None
    return min(by_rate, key=lambda rate: _or_infinite(by_rate[rate]))


def edges(study: Study, losses: Losses, *, extend: bool) -> dict[str, float | None]:
    """{arm whose best rate is at an edge of its grid: the rate to add; None if all rates diverged}."""
    result: dict[str, float | None] = {}
    for name in study.arms:
        rates = grid(study, name, losses, extend=extend)
        if all(Run(name, rate, 0) in losses for rate in rates):
            if best(study, name, losses, extend=extend) is None:
                result[name] = None
            elif beyond := _beyond(rates, name, losses):
                result[name] = beyond
    return result


def due(study: Study, losses: Losses, *, extend: bool) -> list[Run]:
    """The runs that can start now; none if all have ended, or grids must be extended first."""
    tuning = [Run(name, rate, 0) for name in study.arms for rate in grid(study, name, losses, extend=extend)]
    if missing := [run for run in tuning if run not in losses]:
        return _after_sources(study, missing, losses)
    if edges(study, losses, extend=extend):
        return []
    for stage in (study.seeds, study.close_seeds):
        runs = chosen(study, losses, extend=extend, seeds=stage)
        if missing := [run for run in runs if run not in losses]:
            return _after_sources(study, missing, losses)
    return []


def chosen(study: Study, losses: Losses, *, extend: bool, seeds: int) -> list[Run]:
    """The runs of each arm at its best rate with so many seeds; beyond `study.seeds`, of close arms only."""
    rates = {name: best(study, name, losses, extend=extend) for name in study.arms}
    if seeds > study.seeds:
        close = close_arms(study, losses, {name: rate for name, rate in rates.items() if rate})
        rates = {name: rates[name] for name in close}
    return [Run(name, rate, seed) for name, rate in rates.items() if rate for seed in range(seeds)]


def close_arms(study: Study, losses: Losses, rates: Mapping[str, float]) -> list[str]:
    """The arms whose mean loss over the first seeds is close to that of another with the same reference."""
    means = {
        name: sum(losses.get(Run(name, rate, seed), math.nan) for seed in range(study.seeds)) / study.seeds
        for name, rate in rates.items()
    }
    limit = math.log1p(study.close)
    return [
        name
        for name, mean in means.items()
        if any(
            abs(mean - other) <= limit
            for key, other in means.items()
            if key != name and reference_of(study, key) == reference_of(study, name)
        )
    ]


def check_sources(study: Study, losses: Losses) -> None:
    """UserError if a run that provides a warm start has diverged."""
    rate, names = study.base.optimizer.peak_lr, {warm_start_of(study, name) for name in study.arms}
    for run, loss in losses.items():
        if run.arm in names and run.rate == rate and not math.isfinite(loss):
            raise UserError(f"the warm start {run.name} diverged: lower base.optimizer.peak_lr")


def _after_sources(study: Study, runs: list[Run], losses: Losses) -> list[Run]:
    """The runs whose warm start exists, and the runs that provide those of the others."""
    sources = {run: source_of(study, run) for run in runs}
    ready = [run for run, source in sources.items() if source is None or source in losses]
    first = dict.fromkeys(source for source in sources.values() if source and source not in losses)
    return [*first, *(run for run in ready if run not in first)]


def _or_infinite(loss: float | None) -> float:
    return math.inf if loss is None else loss


def _beyond(rates: tuple[float, ...], name: str, losses: Losses) -> float | None:
    """The rate to add to a grid whose best is at an edge: one step beyond it; None if there is no need."""
    by_rate = {rate: losses.get(Run(name, rate, 0), math.nan) for rate in rates}
    if any(map(math.isnan, by_rate.values())) or not any(map(math.isfinite, by_rate.values())):
        return None
    lowest = min(by_rate, key=lambda rate: by_rate[rate])
    if lowest == rates[0]:
        return float(f"{rates[0] ** 2 / rates[1]:.2g}")
    return float(f"{rates[-1] ** 2 / rates[-2]:.2g}") if lowest == rates[-1] else None
