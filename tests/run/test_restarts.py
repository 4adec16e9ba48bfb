"""The row of a restart shows a merge that changes the function, and a reset that clears nothing."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.core import prune
from relora_jax.run.restarts import QUIET_UPDATES, QuietFactors, Restarts
from relora_jax.storage.writer import Writer
from relora_jax.training import ledger, steps
from relora_jax.training.program import Program
from relora_jax.training.state import flatten, unflatten
from tests.support import small

RESTART = 8  # W = 4, cycles of 4


def restarted(
    tmp_path: Path, *, merged: Any = None, mesh: tuple[int, ...] = (1, 1, 1), **changes: Any
) -> Any:
    """(row, state before, state after) of the first restart of a small run; `merged` changes its result."""
    config = small.config(**changes)
    program = Program(config, small.mesh(*mesh))
    state, _ = small.run(config, program, stop=RESTART)
    before = {path: np.asarray(value) for path, value in flatten(program.saved(state)).items()}
    held_out = jax.tree.map(
        lambda rows: jax.device_put(rows[0], program.eval_rows), small.batch(config, program, 0)
    )
    restarts = Restarts(config, program, Writer(tmp_path), held_out)
    restarts.before(state)
    state, due = program.begin_update(RESTART, state)
    state = merged(state, before) if merged else state
    row = restarts.after(RESTART, state, due)
    return {key: None if value is None else float(value) for key, value in row.items()}, before, state


@pytest.mark.parametrize("product", ("separate", pytest.param("fused", marks=pytest.mark.slow)))
def test_restart_that_is_right_changes_logits_by_rounding(tmp_path: Path, product: str) -> None:
    row, _, _ = restarted(tmp_path, relora__product=product)
    assert row["base_rounding"] == 2**-23
    assert row["logits_change"] < 64 * row["base_rounding"] * row["logits_rms"]


@pytest.mark.slow
def test_base_of_bfloat16_changes_logits_by_its_own_rounding(tmp_path: Path) -> None:
    row, _, _ = restarted(tmp_path, relora__base_dtype="bfloat16")
    assert row["base_rounding"] == 2**-7
    assert 2**-20 < row["logits_change"] / row["logits_rms"] < 4 * row["base_rounding"]


def test_lost_merge_shows_in_the_logits(tmp_path: Path) -> None:
    def lost(state: Any, before: dict[str, Any]) -> Any:  # new factors, and the kernels as before
        kernels = {path: jnp.asarray(value) for path, value in before.items() if path.startswith("frozen")}
        return unflatten(flatten(state) | kernels, state)

    row, _, _ = restarted(tmp_path, merged=lost)
    assert row["logits_change"] > 1e-3 * row["logits_rms"]


@pytest.mark.parametrize(
    ("choice", "asked"), [(prune.zero(), 1.0), (prune.magnitude(0.75), 0.75), (prune.none(), 0.0)], ids=str
)
@pytest.mark.slow
def test_share_of_moments_that_was_cleared_is_measured(tmp_path: Path, choice: Any, asked: float) -> None:
    row, before, _ = restarted(tmp_path, relora__prune=choice)
    assert row["moments_asked"] == asked
    factors = [v for path, v in before.items() if "/mu/" in path and path.endswith(("lora_a", "lora_b"))]
    kept = [round((1 - asked) * v[0].size) * v.shape[0] for v in factors]
    assert row["moments_cleared"] == pytest.approx(1 - sum(kept) / sum(v.size for v in factors), abs=1e-6)


def test_reset_that_clears_nothing_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relora_jax.core.reset.reset", lambda opt_state, key: opt_state)
    row, _, _ = restarted(tmp_path, relora__prune=prune.zero())
    assert (row["moments_asked"], row["moments_cleared"]) == (1.0, 0.0)


@pytest.mark.slow
def test_merge_without_a_reset_says_nothing_of_moments(tmp_path: Path) -> None:
    config = {"relora__merges_per_cycle": 2, "relora__cycle_updates": 8, "train__updates": 24}
    row, _, _ = restarted(tmp_path, **config)
    assert row["moments_asked"] is None and row["moments_cleared"] is None


@pytest.mark.parametrize("kind", (pytest.param("merge_and_reinit", marks=pytest.mark.slow), "one_sided"))
def test_norm_and_effective_rank_are_those_of_what_was_merged(tmp_path: Path, kind: str) -> None:
    row, before, _ = restarted(tmp_path, relora__restart=kind)
    squares, ranks = 0.0, []
    for path, a in before.items():
        if path.endswith("lora_a") and "opt_state" not in path:
            b = before[f"trained/{path.partition('/')[2]}".replace("lora_a", "lora_b")]
            for a_l, b_l in zip(a.astype(np.float64), b.astype(np.float64), strict=True):
                values = np.linalg.svd(6.0 / 3 * a_l @ b_l, compute_uv=False)[:3]
                squares += np.sum(values**2)
                p = values / values.sum()
                ranks.append(np.exp(-np.sum(p * np.log(p))))
    assert row["delta_norm"] == pytest.approx(np.sqrt(squares), rel=1e-4)
    assert row["effective_rank"] == pytest.approx(np.mean(ranks), rel=1e-3)


def test_overlap_is_1_for_the_same_space_and_r_over_side_by_chance() -> None:
    rng = np.random.default_rng(0)
    draw = lambda: np.linalg.qr(rng.normal(size=(200, 8)))[0]  # noqa: E731
    one, other = draw(), draw()
    spaces = {"q in": one, "q out": other}
    turned = {name: space @ np.linalg.qr(rng.normal(size=(8, 8)))[0] for name, space in spaces.items()}
    assert ledger.overlaps(spaces, turned) == pytest.approx({"overlap_in": 1.0, "overlap_out": 1.0})
    assert ledger.overlaps(spaces, None) == {"overlap_in": None, "overlap_out": None}
    shares = [
        ledger.overlaps({"q in": draw(), "q out": other}, spaces)["overlap_in"] or 0.0 for _ in range(40)
    ]
    assert np.mean(shares) == pytest.approx(8 / 200, rel=0.15)


def test_spaces_of_the_merge_before_are_read_from_its_file(tmp_path: Path) -> None:
    config = small.config()
    program = Program(config, small.mesh())
    held_out = jax.tree.map(lambda rows: rows[0], small.batch(config, program, 0))
    state, rows = program.init(), {}
    for u in range(13):
        restarts = Restarts(config, program, Writer(tmp_path), held_out)  # as after a resume
        if steps.due(config, u).merge:
            restarts.before(state)
        state, due = program.begin_update(u, state)
        if due.merge:
            rows[u] = restarts.after(u, state, due)
        state, _ = program.train_step(state, small.batch(config, program, u), steps.learning_rate(config, u))
    assert rows[8]["overlap_in"] is None and 0 < rows[12]["overlap_in"] <= 1
    assert sorted(file.name for file in (tmp_path / "restarts").iterdir()) == ["12.npz", "8.npz"]


@pytest.mark.slow
def test_row_is_the_same_on_a_mesh(tmp_path: Path) -> None:
    one, _, _ = restarted(tmp_path)
    many, _, _ = restarted(tmp_path, mesh=(1, 2, 2))
    for key in ("delta_norm", "effective_rank", "moments_cleared"):
        assert many[key] == pytest.approx(one[key], rel=1e-3), key


@pytest.mark.parametrize(
    ("kind", "alarm"),
    [pytest.param("merge_and_reinit", False, marks=pytest.mark.slow), ("merge_and_reinit_late", True)],
)
def test_factors_without_a_gradient_are_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, alarm: bool
) -> None:
    config = small.config(relora__restart=kind, relora__cycle_updates=70, train__updates=90)
    program, quiet = Program(config, small.mesh()), QuietFactors(Writer(tmp_path))
    state = program.init()
    for u in range(4 + 3 * QUIET_UPDATES):
        state, _ = program.begin_update(u, state)
        state, values = program.train_step(state, small.batch(config, program, u), 1e-2)
        quiet.update(u + 1, values.pop("without_gradient", None), state)
    printed = capsys.readouterr().err
    assert printed.count("have had no gradient for 20 updates") == int(alarm)
    assert ("blocks/attention/k/lora_a" in printed) == alarm


def test_effective_rank_counts_equal_values_and_ignores_zeros() -> None:
    for values, expected in (([2.0, 2.0, 2.0, 0.0], 3.0), ([5.0, 0.0, 0.0, 0.0], 1.0), ([0.0] * 4, 0.0)):
        assert ledger.effective_rank(np.array([values])) == pytest.approx(expected)


def test_devices_call_no_lapack() -> None:
    """A batched call of it never ended on two cores: each waited for a thread that the other one held."""
    config = small.config()
    program = Program(config, small.mesh())
    held_out = jax.tree.map(lambda rows: rows[0], small.batch(config, program, 0))
    state = program.start_low_rank(program.init())
    program.restart_facts(state, held_out, after=False)
    lowered = program._facts[False].lower(state, held_out)
    assert "lapack" not in lowered.as_text() and "dot_general" in lowered.as_text()
