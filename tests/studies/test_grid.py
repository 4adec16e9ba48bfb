"""Which runs a study starts next, and what it asks for, given the losses of those that have ended."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from relora_jax.config import changed_results
from relora_jax.errors import UserError
from relora_jax.studies import grid
from relora_jax.studies.grid import Arm, Run, Study
from relora_jax.validate import check_settings
from tests.support import small

RATES = (0.1, 0.2, 0.4)


def study(**changes: Any) -> Study:
    base = small.config("relora")
    base.optimizer.peak_lr = 0.2
    arms = {
        "full": Arm(arm="full", rates=RATES),
        "low": Arm(arm="relora", rates=RATES),
        "cold": Arm(arm="relora", rates=RATES, settings={"relora.warm_start_updates": 0}),
    }
    return Study(name="s", base=base, arms=arms, **changes)


def valley(run: Run) -> float:
    """A loss whose best rate is 0.2 for every arm, that arms and seeds shift."""
    shift = {"full": 0.0, "low": 0.05, "cold": 0.5}[run.arm]
    return 3 + shift + 0.01 * run.seed + abs(math.log(run.rate / 0.2))


def ended(of: Study, loss: Any = valley, *, extend: bool = False) -> tuple[list[list[Run]], dict[Run, float]]:
    """(the runs that were due together, all losses) once nothing is due."""
    losses: dict[Run, float] = {}
    rounds = []
    while runs := grid.due(of, losses, extend=extend):
        assert len(set(runs)) == len(runs) and not set(runs) & set(losses)
        rounds.append(runs)
        losses |= {run: loss(run) for run in runs}
        assert len(rounds) < 20
    return rounds, losses


def test_rates_are_tuned_with_seed_0_then_the_best_is_repeated() -> None:
    rounds, losses = ended(study(close=0.0))
    tuned = {Run(arm, rate, 0) for arm in ("full", "low", "cold") for rate in RATES}
    repeated = {Run(arm, 0.2, seed) for arm in ("full", "low", "cold") for seed in (1, 2)}
    assert losses.keys() == tuned | repeated
    assert {run.seed for runs in rounds[:2] for run in runs} == {0}


def test_warm_start_ends_before_the_runs_that_begin_with_it() -> None:
    rounds, _ = ended(study())
    assert {run for run in rounds[0] if run.arm == "low"} == set()
    assert Run("full", 0.2, 0) in rounds[0] and {run.arm for run in rounds[0]} == {"full", "cold"}
    order = [run for runs in rounds for run in runs]
    for run in order:
        if source := grid.source_of(study(), run):
            assert order.index(source) < order.index(run)
            assert not any(run in runs and source in runs for runs in rounds)


def test_arms_that_are_close_get_more_seeds() -> None:
    _, losses = ended(study(close=0.06))  # log 1.06 = 0.058: full and low are 0.05 apart
    seeds = {arm: max(run.seed for run in losses if run.arm == arm) for arm in ("full", "low", "cold")}
    assert seeds == {"full": 4, "low": 4, "cold": 2}


@pytest.mark.parametrize(("best", "add"), [(0.1, 0.05), (0.4, 0.8)])
def test_best_rate_at_an_edge_stops_the_study_and_names_the_rate_to_add(best: float, add: float) -> None:
    def loss(run: Run) -> float:
        return 3 + abs(math.log(run.rate / (best if run.arm == "low" else 0.2)))

    _, losses = ended(study(), loss)
    assert max(run.seed for run in losses) == 0
    assert grid.edges(study(), losses, extend=False) == {"low": add}


@pytest.mark.parametrize(("best", "added"), [(0.05, {0.05, 0.025}), (1.6, {0.8, 1.6, 3.2})])
def test_grid_grows_until_its_best_is_inside(best: float, added: set[float]) -> None:
    def loss(run: Run) -> float:
        return 3 + abs(math.log(run.rate / (best if run.arm == "low" else 0.2)))

    _, losses = ended(study(), loss, extend=True)
    assert {run.rate for run in losses if run.arm == "low" and run.seed == 0} == {*RATES, *added}
    assert {run.rate for run in losses if run.seed == 1 and run.arm == "low"} == {best}
    assert not grid.edges(study(), losses, extend=True)


def test_grid_stops_growing_and_says_so() -> None:
    _, losses = ended(study(), lambda run: 3 - math.log(run.rate) * (run.arm == "low"), extend=True)
    assert len({run.rate for run in losses if run.arm == "low"}) == len(RATES) + grid.MOST_ADDED
    assert "low" in grid.edges(study(), losses, extend=True)


def test_run_that_diverges_is_a_result() -> None:
    _, losses = ended(study(), lambda run: math.inf if run.rate == 0.4 else valley(run))
    assert grid.best(study(), "low", losses, extend=False) == 0.2
    _, losses = ended(study(), lambda run: math.inf if run.arm == "cold" else valley(run))
    assert grid.edges(study(), losses, extend=False) == {"cold": None}


def test_diverged_warm_start_is_an_error() -> None:
    losses = {Run("full", 0.1, 0): math.inf}
    grid.check_sources(study(), losses)
    losses |= {Run("full", 0.2, 1): math.inf}
    with pytest.raises(UserError, match=r"warm start full-0\.2-1 diverged: lower base\.optimizer"):
        grid.check_sources(study(), losses)


def test_runs_of_a_seed_share_the_warm_start_and_everything_but_their_own_settings() -> None:
    folder, of = Path("runs/s"), study()
    low, cold, full = (grid.config(of, Run(arm, 0.4, 3), folder) for arm in ("low", "cold", "full"))
    assert low.train.init_from == str(folder / "full-0.2-3") and not cold.train.init_from
    assert low.relora.peak_lr == 0.4 and full.optimizer.peak_lr == 0.4 and full.arm == "full"
    assert {low.train.seed, cold.train.seed, full.train.seed} == {3}
    assert cold.relora.warm_start_updates == 0 and of.base.relora.warm_start_updates == 4
    source = grid.config(of, Run("full", 0.2, 3), folder)
    changed = changed_results(source, low)
    assert [text.partition(":")[0] for text in changed] == ["arm", "relora.peak_lr", "train.init_from"]
    for config in (low, cold, full):
        check_settings(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference": "best"}, "has no arm best"),
        ({"warm_start": "low"}, "must be an arm that trains in full rank"),
        (
            {"arms": {"full": Arm(arm="full", rates=RATES, settings={"optimizer.name": "muon"})}},
            "in full rank with adamw",
        ),
        ({"arms": {"full": Arm(arm="full", rates=(0.1,))}}, "must be at least two"),
        ({"seeds": 0}, "seeds 0 must be from 1"),
        ({"seeds": 9}, "to close_seeds 5"),
        ({"close": -1.0}, "close -1.0 must be at least 0"),
        ({"arms": {"full": Arm(arm="full", rates=(0.2, 0.1))}}, "increasing"),
        ({"arms": {"full": Arm(arm="full", rates=RATES, settings={"relora.r": 1})}}, "relora.r is not a"),
    ],
)
def test_mistake_in_a_study_is_named_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        grid.check(dataclasses.replace(study(), **change))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_arm_of_another_size_needs_a_reference_of_its_own() -> None:
    of = study()
    of.arms["wide"] = Arm(arm="relora", rates=RATES, settings={"model.mlp": 32})
    with pytest.raises(UserError, match=r"arm wide has a model of .* full-rank arm of its own size"):
        grid.check(of)


def sized() -> Study:
    """Two sizes, each with a full-rank arm of its own."""
    of, wide = study(close=0.06), {"model.mlp": 32}
    of.arms = {
        "full": Arm(arm="full", rates=RATES),
        "low": Arm(arm="relora", rates=RATES),
        "full@2": Arm(arm="full", rates=RATES, settings=wide, reference="full@2"),
        "low@2": Arm(arm="relora", rates=RATES, settings=wide, reference="full@2"),
    }
    grid.check(of)
    return of


def test_arms_of_two_sizes_are_not_close_to_each_other() -> None:
    level = {"full": 3.0, "low": 3.5, "full@2": 2.5, "low@2": 3.01}
    _, losses = ended(sized(), lambda run: level[run.arm] + abs(math.log(run.rate / 0.2)))
    assert max(run.seed for run in losses) == 2
    level["low@2"] = 2.51  # close to the full-rank arm of its own size
    _, losses = ended(sized(), lambda run: level[run.arm] + abs(math.log(run.rate / 0.2)))
    assert {run.arm for run in losses if run.seed == 4} == {"full@2", "low@2"}
