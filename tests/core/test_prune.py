"""A choice of pruning is a value that its own text reads back, and it keeps a number known beforehand."""

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
def test_text_reads_back_as_the_choice_it_wrote(prune: Prune) -> None:
    assert parse(str(prune)) == prune and str(parse(str(prune))) == str(prune)
    assert hash(parse(str(prune))) == hash(prune)


def test_texts_are_those_of_the_grammar() -> None:
    written = {"zero": zero(), "none": none(), "magnitude(0.9)": magnitude(0.9), "random(0.99)": random(0.99)}
    assert {str(prune): prune for prune in written.values()} == written
    assert {prune.kind for prune in written.values()} == CHOICES.keys()
    others = {
        "zero()": zero(),
        "none( )": none(),
        " magnitude ( .9 ) ": magnitude(0.9),
        "random(1)": random(1),
    }
    assert {text: parse(text) for text in others} == others


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
def test_other_text_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"cannot be read: write zero, magnitude\(0\.9\), random\(0\.99\) or none"
    ):
        parse(text)


@pytest.mark.parametrize("fraction", ("-0.1", "1.1", "nan", "inf", "90"))
@pytest.mark.parametrize("kind", ("magnitude", "random"))
def test_impossible_shares_are_refused_with_their_value(kind: str, fraction: str) -> None:
    with pytest.raises(ValueError, match=rf"{kind}\({float(fraction)}\) clears an impossible share"):
        parse(f"{kind}({fraction})")


@pytest.mark.parametrize(
    ("fraction", "entries", "kept"),
    [
        (0.9, 100, 10),
        (0.99, 100, 1),
        (0.5, 5, 2),  # 2.5 goes to the even number,
        (0.5, 7, 4),  # and so does 3.5
        (0.9, 5, 0),  # 1 - 0.9 lies below 0.1: 0.49999999999999994
        (0.9, 25, 2),  # 2.4999999999999996, which float32 would have above 2.5
        (0.7, 5, 2),  # 1.5000000000000002
        (0.9, 19, 2),  # rounded, not cut off
        (0.999, 400, 0),
        (0.0, 17, 17),
        (1.0, 17, 0),
    ],
)
def test_kept_is_the_rounded_float64_product(fraction: float, entries: int, kept: int) -> None:
    assert magnitude(fraction).kept(entries) == random(fraction).kept(entries) == kept


@pytest.mark.parametrize("entries", [1, 5, 60])
@given(prune=ANY)
@settings(deadline=None, max_examples=20)
def test_mask_of_zero_keeps_nothing_none_everything_and_others_their_share(
    prune: Prune, entries: int
) -> None:
    statistic = np.random.default_rng(entries).normal(size=(3, entries)).astype(np.float32)
    mask = np.asarray(prune.mask(jnp.asarray(statistic), jax.random.key(0)))
    assert mask.shape == statistic.shape and mask.dtype == bool
    fraction = {"zero": 1.0, "none": 0.0}.get(prune.kind) or getattr(prune, "prune_fraction", 0.0)
    assert mask.sum(axis=1).tolist() == [round((1 - fraction) * entries)] * 3
    assert prune.keeps_nothing == (prune.kind == "zero") and prune.clears == (prune.kind != "none")


def test_zero_clears_what_is_no_number() -> None:
    assert not np.any(zero().mask(jnp.full((2, 4), jnp.nan), jax.random.key(0)))
