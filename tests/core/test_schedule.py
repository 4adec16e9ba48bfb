"""The multiplier matches the paper at every s, and resets coincide with its dips."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_jax.core.schedule import cosine, is_merge, is_reset, multiplier

PAPER: dict[str, Any] = {
    "total": 15000,
    "warm_up": 500,
    "min_lr_ratio": 0.1,
    "cycle": 5000,
    "restart_warm_up": 100,
}
GOLDEN = {
    **{0: 0, 1: 0.002, 499: 0.998, 500: 1, 4999: 0.802615},
    **{5000: 0, 5001: 0.007944, 5050: 0.397203, 5099: 0.786462, 5100: 0.794406},
    **{9999: 0.339302, 10000: 0, 10100: 0.330652, 14999: 0.1},
}


@pytest.mark.parametrize("s", GOLDEN)
def test_multiplier_matches_golden_values(s: int) -> None:
    assert multiplier(s, **PAPER) == pytest.approx(GOLDEN[s], abs=5e-7)


def test_zeros_are_exact() -> None:
    assert [multiplier(s, **PAPER) for s in (0, 5000, 10000)] == [0, 0, 0]


@st.composite
def legal(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that `validate` accepts: warm-ups fit in a cycle, and the run does not end in a re-warm-up."""
    cycle = draw(st.integers(1, 60))
    wr = draw(st.integers(0, cycle))
    total = draw(st.integers(1, 5)) * cycle + draw(st.one_of(st.just(0), st.integers(wr, max(cycle - 1, wr))))
    warm_up, min_lr_ratio = draw(st.integers(0, cycle)), draw(st.floats(0, 1))
    return {
        "total": total,
        "warm_up": warm_up,
        "min_lr_ratio": min_lr_ratio,
        "cycle": cycle,
        "restart_warm_up": wr,
    }


@given(settings=legal())
def test_multiplier_is_between_0_and_1_and_above_its_floor_outside_of_ramps(settings: Any) -> None:
    for s in range(settings["total"]):
        value = multiplier(s, **settings)
        assert 0 <= value <= 1 + 1e-12
        ramp = s < settings["warm_up"] or (
            s >= settings["cycle"] and s % settings["cycle"] < settings["restart_warm_up"]
        )
        assert ramp or value >= settings["min_lr_ratio"] - 1e-12


@given(settings=legal())
def test_multiplier_is_zero_at_a_reset_and_the_ramp_ends_on_the_cosine(settings: Any) -> None:
    cycle, wr = settings["cycle"], settings["restart_warm_up"]
    plain = {
        "total": settings["total"],
        "warm_up": settings["warm_up"],
        "min_lr_ratio": settings["min_lr_ratio"],
    }
    for s in range(settings["total"]):
        if not is_reset(s, cycle=cycle) or s < settings["warm_up"]:
            continue
        end = cosine(s + wr, **plain)
        assert wr == 0 or multiplier(s, **settings) == 0
        if wr < cycle and s + wr < settings["total"]:
            assert multiplier(s + wr, **settings) == end
        for k in range(wr):
            assert multiplier(s + k, **settings) * wr == pytest.approx(k * end, abs=1e-9)


@given(settings=legal())
def test_without_a_cycle_the_schedule_never_dips(settings: Any) -> None:
    plain = {**settings, "cycle": 0}
    values = [multiplier(s, **plain) for s in range(settings["total"])]
    top = settings["warm_up"]
    assert values[:top] == [s / top for s in range(min(top, settings["total"]))]
    assert all(a >= b - 1e-12 for a, b in zip(values[top:], values[top + 1 :], strict=False))
    assert top >= settings["total"] or values[top] == pytest.approx(1)


def test_no_warm_up_starts_at_the_peak() -> None:
    assert multiplier(0, **{**PAPER, "warm_up": 0}) == 1
    assert multiplier(0, total=1, warm_up=0, min_lr_ratio=0.0) == 1
    assert multiplier(4, total=4, warm_up=4, min_lr_ratio=0.5) == 1  # a run that ends with its warm-up


def test_no_restart_warm_up_means_no_dip() -> None:
    settings = {**PAPER, "restart_warm_up": 0}
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 4500 / 14500)) / 2
    assert (
        multiplier(5000, **settings)
        == pytest.approx(middle)
        == cosine(5000, total=15000, warm_up=500, min_lr_ratio=0.1)
    )


def test_first_cycle_has_only_the_initial_warm_up() -> None:
    values = [multiplier(s, **{**PAPER, "restart_warm_up": 2000}) for s in (501, 1000, 1999)]
    assert all(value > 0.97 for value in values)


def test_merges_divide_a_cycle_evenly_and_resets_end_it() -> None:
    merges = [s for s in range(30) if is_merge(s, cycle=12, merges_per_cycle=3)]
    assert merges == [4, 8, 12, 16, 20, 24, 28]
    assert [s for s in range(30) if is_merge(s, cycle=12)] == [12, 24]
    assert [s for s in range(30) if is_reset(s, cycle=12)] == [12, 24]
    assert [s for s in range(4) if is_reset(s, cycle=1)] == [1, 2, 3]


@given(cycle=st.integers(1, 50), parts=st.integers(1, 7), s=st.integers(0, 1000))
def test_each_reset_is_also_a_merge(cycle: int, parts: int, s: int) -> None:
    assert not is_reset(s, cycle=cycle * parts) or is_merge(s, cycle=cycle * parts, merges_per_cycle=parts)
