"""A study's report, from the files of runs that ended, diverged, or share a warm start."""

import json
import math
from pathlib import Path

import pytest

from relora_jax.config import to_json
from relora_jax.errors import UserError
from relora_jax.run import record
from relora_jax.studies import grid, page, pictures, results, runner
from relora_jax.studies.grid import Arm, Run, Study
from tests.support import small
from tests.support.reports import figures  # noqa: F401  (a fixture)

RATES = (0.1, 0.2, 0.4)


@pytest.fixture
def study() -> Study:
    base = small.config("relora")
    base.optimizer.peak_lr = 0.2
    arms = {"full": Arm(arm="full", rates=RATES), "low": Arm(arm="relora", rates=RATES)}
    return Study(name="s", base=base, arms=arms, seeds=2, close_seeds=2)


def train(study: Study, folder: Path, run: Run, loss: float) -> None:
    """Writes the files of a run whose updates take a second each, and which ends with the loss."""
    config, workdir = grid.config(study, run, folder), folder / run.name
    workdir.mkdir(parents=True)
    (workdir / record.CONFIG).write_text(to_json(config))
    start = config.low_rank_start if config.train.init_from else 0
    updates = range(start + 1, 17)
    rows = [{"kind": "train", "update": u, "elapsed_s": float(u - start)} for u in updates]
    for u in range(start, 17, 4):
        value = loss + (16 - u) / 10
        perplexity = results.exp(value)
        rows.append(
            {"kind": "eval", "update": u, "loss": value, "perplexity": perplexity}
            if math.isfinite(loss)
            else {"kind": "eval", "update": u, "loss": None, "perplexity": None}
        )
    (workdir / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def test_report_of_a_study_in_which_a_seed_diverged(study: Study, tmp_path: Path) -> None:
    losses = {Run(arm, rate, 0): 2 + abs(math.log(rate / 0.2)) for arm in study.arms for rate in RATES}
    losses |= {Run("full", 0.2, 1): 2.5, Run("low", 0.2, 1): math.inf}
    for run, loss in losses.items():
        train(study, tmp_path, run, loss)
    text = page.write(study, tmp_path, losses, extend=False).read_text()
    assert "| full | 0.2 | 2 | 9.5 ± 3.4 |  |" in text
    assert "| low | 0.2 | 2 | inf | +0.000 |" in text  # one pair is left
    assert "**0.2: 7.4**" in text and "14.8" in text
    saved = json.loads((tmp_path / "s.json").read_text())
    assert saved["arms"]["low"]["losses"] == [2.0, None] and saved["arms"]["low"]["perplexity"] is None
    kept, recomputed = saved["bytes"], saved["bytes_recomputed"]
    assert kept["full"]["moments"] == recomputed["full"]["moments"] > kept["low"]["moments"] > 0
    assert kept["full"]["temporaries"] > recomputed["full"]["temporaries"] > 0
    totals = [sum(splits["low"].values()) / 1e6 for splits in (kept, recomputed)]
    row = next(
        line for line in text.splitlines() if line.startswith("| low | inf |") and f"{totals[0]:.2f}" in line
    )
    assert f" {totals[1]:.2f} " in row
    assert {"s_curves.png", "s_rates.png", "s.html"} <= {file.name for file in tmp_path.iterdir()}


def test_curve_continues_that_of_its_warm_start_in_time_too(study: Study, tmp_path: Path) -> None:
    train(study, tmp_path, Run("full", 0.2, 0), 2.0)
    train(study, tmp_path, Run("low", 0.2, 0), 1.5)
    curve = results.curve_of(tmp_path / "low-0.2-0")
    per_update = results.tokens(study.base)
    assert [point.tokens for point in curve] == [u * per_update for u in (0, 4, 8, 12, 16)]
    assert [point.seconds for point in curve] == [0, 4, 8, 12, 16]
    assert [round(point.loss, 6) for point in curve] == [3.6, 3.2, 2.3, 1.9, 1.5]


def test_arms_of_another_size_are_compared_with_the_full_rank_arm_of_that_size(
    study: Study, tmp_path: Path
) -> None:
    wide = {"model.mlp": 32}
    study.arms = {
        "full@1": Arm(arm="full", rates=RATES),
        "low@1": Arm(arm="relora", rates=RATES),
        "full@2": Arm(arm="full", rates=RATES, settings=wide, reference="full@2"),
        "low@2": Arm(arm="relora", rates=RATES, settings=wide, reference="full@2"),
    }
    study.reference = study.warm_start = "full@1"
    grid.check(study)
    level = {"full@1": 3.0, "low@1": 3.5, "full@2": 2.0, "low@2": 2.25}
    losses = {
        Run(arm, rate, seed): loss + seed * 0.125 + abs(math.log(rate / 0.2))
        for arm, loss in level.items()
        for rate in RATES
        for seed in (0, 1)
        if rate == 0.2 or not seed
    }
    for run, loss in losses.items():
        train(study, tmp_path, run, loss)
    text = page.write(study, tmp_path, losses, extend=False).read_text()
    assert "| low@2 | 0.2 | 2 | 10.1 ± 0.9 | **+0.250 ± 0.000** |" in text
    sizes = json.loads((tmp_path / "s.json").read_text())["parameters"]
    small_size, large_size = sizes["low@1"], sizes["low@2"]
    assert large_size - small_size == 2 * 3 * 16 * (32 - 24) and sizes["full@2"] == large_size
    assert f"| method | {small_size / 1e6:.2f}M | {large_size / 1e6:.2f}M |" in text
    assert "| low | **+0.500 ± 0.000** | **+0.250 ± 0.000** |" in text
    pairs = text.split("## Pairs")[1].split("##")[0]
    assert "| arm | full@1 | low@1 | full@2 |" in pairs and "| low@1 | **+0.500 ± 0.000** |  |  |" in pairs
    assert "| low@2 | **-0.750 ± 0.000** | **-1.250 ± 0.000** | **+0.250 ± 0.000** |" in pairs
    source = grid.config(study, Run("low@2", 0.2, 1), tmp_path).train.init_from
    assert source == str(tmp_path / "full@2-0.2-1") and (tmp_path / "s_gaps.png").is_file()


def test_study_that_was_moved_is_taken(study: Study, tmp_path: Path) -> None:
    for run in (Run("full", 0.2, 0), Run("low", 0.2, 0)):
        train(study, tmp_path / "here", run, 2.0)
    (tmp_path / "here").rename(tmp_path / "there")
    workdir = tmp_path / "there" / "low-0.2-0"
    runner.check(workdir, grid.config(study, Run("low", 0.2, 0), tmp_path / "there"))
    assert len(results.curve_of(workdir)) == 5
    with pytest.raises(UserError, match="is of a study with other settings"):
        runner.check(workdir, grid.config(study, Run("low", 0.4, 0), tmp_path / "there"))


def test_rates_have_a_tick_at_each_that_was_tried(tmp_path: Path, figures) -> None:  # noqa: F811
    pictures.rates(
        tmp_path / "rates.png", {"a": {0.008: 3.0, 0.016: 2.0}, "b": {0.032: 2.0, 0.016: math.inf}}
    )
    axes = figures["rates.png"].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.008", "0.016", "0.032"]
    assert not axes.get_xticks(minor=True).size
    assert axes.get_legend() is None and len(figures["rates.png"].legends) == 1  # above, not over the lines
