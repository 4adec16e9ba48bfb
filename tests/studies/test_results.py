"""Paired differences, their intervals, and when a curve was where another ended."""

import math
from pathlib import Path

import numpy as np
import pytest

from relora_jax.studies import results
from relora_jax.studies.grid import Arm, Run, Study
from relora_jax.studies.results import Point, flops, paired, reached, tokens
from tests.support import small


def curve(*losses: float) -> list[Point]:
    return [Point(10.0 * n, 100.0 * n, n, loss) for n, loss in enumerate(losses)]


def test_interval_covers_the_true_difference_in_95_of_100_studies() -> None:
    rng, inside, trials = np.random.default_rng(0), 0, 2000
    for _ in range(trials):
        seeds = rng.normal(0, 1, 4)  # what both runs of a pair share
        ours, theirs = seeds + rng.normal(0.3, 0.1, 4), seeds + rng.normal(0, 0.1, 4)
        difference = paired(dict(enumerate(ours)), dict(enumerate(theirs)))
        assert difference is not None and difference.pairs == 4
        inside += abs(difference.mean - 0.3) <= difference.half_width
    assert abs(inside / trials - 0.95) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_single_pair_has_no_interval_and_diverged_runs_are_no_pairs() -> None:
    one = paired({0: 3.0, 1: math.inf, 4: 9.0}, {0: 2.5, 1: 2.0, 3: 1.0})
    assert one is not None and (one.mean, one.pairs, one.is_clear) == (0.5, 1, False)
    assert math.isnan(one.half_width)
    assert paired({0: math.inf}, {0: 1.0}) is None and paired({1: 2.0}, {0: 1.0}) is None


def test_pairs_are_of_the_same_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "curve_of", lambda workdir: [])
    arms = {name: Arm(arm="full", rates=(1.0, 2.0, 3.0)) for name in ("full", "other")}
    study = Study(name="s", base=small.config(), arms=arms)
    losses = {Run(name, rate, 0): 5.0 for name in arms for rate in (1.0, 3.0)}
    losses |= {Run("full", 2.0, seed): loss for seed, loss in enumerate((2.0, 3.0, 4.0))}
    losses |= {Run("other", 2.0, seed): loss for seed, loss in ((2, 4.1), (0, 2.1), (1, 3.1), (7, 3.1))}
    arms_of = results.of_arms(study, tmp_path, losses, extend=False)
    other = arms_of["other"]
    assert other.difference is not None and other.difference.is_clear
    assert other.difference.mean == pytest.approx(0.1) and other.difference.half_width < 1e-9
    assert other.perplexity == pytest.approx(math.exp(3.1)) and other.best_rate == 2.0
    assert arms_of["full"].difference is None and arms_of["full"].spread == pytest.approx(
        np.std(np.exp([2.0, 3.0, 4.0]), ddof=1)
    )


@pytest.mark.parametrize(
    ("loss", "expected"), [(5.0, 0.0), (4.0, 10.0), (3.5, 15.0), (3.0, 20.0), (2.9, None)]
)
def test_amount_is_linear_between_evaluations(loss: float, expected: float | None) -> None:
    assert reached(curve(5, 4, 3, 3.2), loss, "tokens") == expected


def test_flops_are_counted_by_phase() -> None:
    config = small.config("relora")
    warm = flops(config, 4)
    assert warm == flops(small.config("full"), 4) and tokens(config) == 8 * config.data.sequence_length
    assert flops(config, 10) - warm < 1.2 * (flops(small.config("full"), 10) - warm)
    one_sided = small.config("relora", relora__restart="one_sided")
    assert flops(one_sided, 10) < flops(config, 10) and flops(one_sided, 4) == warm
