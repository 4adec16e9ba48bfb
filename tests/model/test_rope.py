"""Rotary position scalings: their grammar, and which pairs they slow down."""

import numpy as np
import pytest

from relora_jax.model import rope
from relora_jax.model.rope import Dynamic, Linear, Llama3, Unscaled, Yarn

TEXTS = {
    "none": Unscaled(),
    " linear( 4 ) ": Linear(4.0),
    "dynamic(2,2048)": Dynamic(2.0, 2048.0),
    "llama3(8, 1, 4, 8192)": Llama3(8.0, 1.0, 4.0, 8192.0),
    "yarn(4, 4096, 32, 1, 1.14)": Yarn(4.0, 4096.0, 32.0, 1.0, 1.14),
}
INVALID = {
    "": "is not valid",
    "linear": "is not valid: use none, linear(4.0), dynamic(2.0, 2048.0)",
    "linear()": "is not valid: use none",
    "linear(4, 5)": "is not valid: use none",
    "none(1)": "is not valid: use none",
    "longrope(4)": "is not valid: use none",
    "linear(four)": "is not valid",
    "linear(0)": "must be finite and above 0",
    "linear(-2)": "must be finite and above 0",
    "linear(nan)": "must be finite and above 0",
    "linear(inf)": "must be finite and above 0",
    "llama3(8, 4, 4, 8192)": "low must be below high",
}


def frequencies(text: str, *, theta: float = 1e4, length: int = 64, head_dim: int = 64) -> np.ndarray:
    return rope.parse(text).frequencies(head_dim, theta=theta, length=length)


@pytest.mark.parametrize("text", TEXTS)
def test_scaling_round_trips_through_its_text(text: str) -> None:
    assert rope.parse(text) == TEXTS[text] == rope.parse(str(TEXTS[text]))


@pytest.mark.parametrize("text", INVALID)
def test_invalid_text_raises_with_the_reason(text: str) -> None:
    with pytest.raises(ValueError, match="rope scaling") as error:
        rope.parse(text)
    assert INVALID[text] in str(error.value)


def test_llama3_and_yarn_keep_fast_pairs_and_slow_down_the_rest() -> None:
    plain = frequencies("none")
    for text in ("llama3(8, 1, 4, 8192)", "yarn(8, 8192, 4, 1, 1.2)"):
        share = frequencies(text) / plain
        turns = 8192 * plain / (2 * np.pi)
        assert np.all(share[turns > 6] == 1)
        np.testing.assert_allclose(share[turns < 0.6], 1 / 8, rtol=1e-12)
        between = share[(turns > 1.4) & (turns < 3.5)]
        assert len(between) and np.all((between > 1 / 8) & (between < 1))
        assert np.all(np.diff(share) <= 0)


def test_yarn_ramp_ends_at_the_last_index_of_the_head() -> None:
    # beta_slow is so small that its index is far beyond the 4 pairs: the ramp ends at 7, as published
    share = frequencies("yarn(4, 100, 8, 1e-9, 1)", head_dim=8) / frequencies("none", head_dim=8)
    first = np.floor(4 * np.log(100 / (8 * 2 * np.pi)) / np.log(1e4))
    ramp = 1 - (np.arange(4) - first) / (7 - first)
    np.testing.assert_allclose(share, ramp + (1 - ramp) / 4, rtol=1e-12)


def test_only_yarn_scales_cos_and_sin() -> None:
    assert [scaling.amplitude() for scaling in TEXTS.values()] == [1, 1, 1, 1, 1.14]


def test_dynamic_is_unscaled_up_to_its_length_and_slower_beyond() -> None:
    np.testing.assert_array_equal(frequencies("dynamic(2, 64)", length=64), frequencies("none"))
    longer = frequencies("dynamic(2, 64)", length=128)
    assert longer[0] == 1 and np.all(longer[1:] < frequencies("none")[1:])
    # the slowest pair rotates over 2 x 128 - 64 positions as far as it did over 64
    np.testing.assert_allclose(longer[-1] * 3, frequencies("none")[-1], rtol=1e-12)
