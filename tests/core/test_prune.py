"""A prune choice round-trips through its text and keeps an exact number of entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relora_jax.core.prune import CHOICES, Prune, magnitude, none, parse, random, zero

FRACTIONS = st.floats(0, 1)
ANY = st.one_of(
    st.just(zero()), st.just(none()), st.builds(magnitude, FRACTIONS), st.builds(random, FRACTIONS)
)


@given(prune=ANY)
def test_choice_round_trips_through_its_text(prune: Prune) -> None:
    assert parse(str(prune)) == prune and str(parse(str(prune))) == str(prune)
    assert hash(parse(str(prune))) == hash(prune)


def test_texts_follow_the_grammar() -> None:
    texts = {"zero": zero(), "none": none(), "magnitude(0.9)": magnitude(0.9), "random(0.99)": random(0.99)}
    assert {str(prune): prune for prune in texts.values()} == texts
    assert {prune.kind for prune in texts.values()} == CHOICES.keys()
    variants = {
        "zero()": zero(),
        "none( )": none(),
        " magnitude ( .9 ) ": magnitude(0.9),
        "random(1)": random(1),
    }
    assert {text: parse(text) for text in variants} == variants


@pytest.mark.parametrize(
    "text",
    (
        *("", "half", "Zero", "zero(0.5)", "none(1)", "magnitude", "magnitude()", "random()", "magnitude(x)"),
        *(
            "magnitude(0.9",
            "magnitude 0.9",
            "magnitude(0.9, 0.1)",
            "magnitude((0.9))",
            "magnitude(0.9) random",
        ),
    ),
)
def test_invalid_text_raises_listing_the_valid_ones(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"is not valid: use zero, magnitude\(0\.9\), random\(0\.99\) or none"
    ):
        parse(text)


@pytest.mark.parametrize("fraction", ("-0.1", "1.1", "nan", "inf", "90"))
@pytest.mark.parametrize("kind", ("magnitude", "random"))
def test_invalid_fraction_is_reported_with_its_value(kind: str, fraction: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind}\({float(fraction)}\): the fraction must be in"):
        parse(f"{kind}({fraction})")


@pytest.mark.parametrize(
    ("fraction", "entries", "survivors"),
    [
        (0.9, 100, 10),
        (0.99, 100, 1),
        (0.5, 5, 2),  # 2.5 rounds to even,
        (0.5, 7, 4),  # and so does 3.5
        (0.9, 5, 0),  # 0.49999999999999994: 1 - 0.9 is below 0.1
        (0.9, 25, 2),  # 2.4999999999999996, above 2.5 in float32
        (0.7, 5, 2),  # 1.5000000000000002
        (0.9, 19, 2),  # rounded, not truncated
        (0.999, 400, 0),
        (0.0, 17, 17),
        (1.0, 17, 0),
    ],
)
def test_survivors_are_the_rounded_float64_product(fraction: float, entries: int, survivors: int) -> None:
    assert magnitude(fraction).survivors(entries) == random(fraction).survivors(entries) == survivors


@pytest.mark.parametrize("entries", [1, 5, pytest.param(60, marks=pytest.mark.slow)])
@given(prune=ANY)
@settings(deadline=None, max_examples=20)
def test_mask_keeps_the_exact_number_of_entries_per_layer(prune: Prune, entries: int) -> None:
    statistic = np.random.default_rng(entries).normal(size=(3, entries)).astype(np.float32)
    mask = np.asarray(prune.mask(jnp.asarray(statistic), jax.random.key(0)))
    assert mask.shape == statistic.shape and mask.dtype == bool
    fraction = {"zero": 1.0, "none": 0.0}.get(prune.kind) or getattr(prune, "prune_fraction", 0.0)
    assert mask.sum(axis=1).tolist() == [round((1 - fraction) * entries)] * 3
    assert prune.keeps_nothing == (prune.kind == "zero") and prune.clears == (prune.kind != "none")


def test_zero_clears_nan() -> None:
    assert not np.any(zero().mask(jnp.full((2, 4), jnp.nan), jax.random.key(0)))
