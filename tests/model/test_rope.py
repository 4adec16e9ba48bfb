"""Scalings of rotary positions: their grammar, and which pairs they slow."""

import numpy as np
import pytest

from relora_jax.model import rope
from relora_jax.model.rope import Dynamic, Linear, Llama3, Unscaled, Yarn

WRITTEN = {
    "none": Unscaled(),
    " linear( 4 ) ": Linear(4.0),
    "dynamic(2,2048)": Dynamic(2.0, 2048.0),
    "llama3(8, 1, 4, 8192)": Llama3(8.0, 1.0, 4.0, 8192.0),
    "yarn(4, 4096, 32, 1, 1.14)": Yarn(4.0, 4096.0, 32.0, 1.0, 1.14),
}
UNREADABLE = {
    "": "cannot be read",
    "linear": "cannot be read: write none, linear(4.0), dynamic(2.0, 2048.0)",
    "linear()": "cannot be read: write none",
    "linear(4, 5)": "cannot be read: write none",
    "none(1)": "cannot be read: write none",
    "longrope(4)": "cannot be read: write none",
    "linear(four)": "cannot be read",
    "linear(0)": "must be finite and above 0",
    "linear(-2)": "must be finite and above 0",
    "linear(nan)": "must be finite and above 0",
    "linear(inf)": "must be finite and above 0",
    "llama3(8, 4, 4, 8192)": "low must be below high",
}


def turn(text: str, *, theta: float = 1e4, length: int = 64, head_dim: int = 64) -> np.ndarray:
    return rope.parse(text).frequencies(head_dim, theta=theta, length=length)


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_read_back(text: str) -> None:
    assert rope.parse(text) == WRITTEN[text] == rope.parse(str(WRITTEN[text]))


@pytest.mark.parametrize("text", UNREADABLE)
def test_what_cannot_be_read_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="rope scaling") as caught:
        rope.parse(text)
    assert UNREADABLE[text] in str(caught.value)


def test_llama3_and_yarn_keep_fast_pairs_and_divide_slow_ones() -> None:
    plain = turn("none")
    for text in ("llama3(8, 1, 4, 8192)", "yarn(8, 8192, 4, 1, 1.2)"):
        share = turn(text) / plain
        turns = 8192 * plain / (2 * np.pi)
        assert np.all(share[turns > 6] == 1)
        np.testing.assert_allclose(share[turns < 0.6], 1 / 8, rtol=1e-12)
        between = share[(turns > 1.4) & (turns < 3.5)]
        assert len(between) and np.all((between > 1 / 8) & (between < 1))
        assert np.all(np.diff(share) <= 0)


def test_ramp_of_yarn_ends_with_the_last_index_of_the_head() -> None:
    # so few turns are `slow` that their index lies far behind the 4 pairs: the ramp ends at 7, as published
    share = turn("yarn(4, 100, 8, 1e-9, 1)", head_dim=8) / turn("none", head_dim=8)
    first = np.floor(4 * np.log(100 / (8 * 2 * np.pi)) / np.log(1e4))
    kept = 1 - (np.arange(4) - first) / (7 - first)
    np.testing.assert_allclose(share, kept + (1 - kept) / 4, rtol=1e-12)


def test_only_yarn_scales_cos_and_sin() -> None:
    assert [scaling.amplitude() for scaling in WRITTEN.values()] == [1, 1, 1, 1, 1.14]


def test_dynamic_is_none_up_to_its_length_and_slower_beyond() -> None:
    np.testing.assert_array_equal(turn("dynamic(2, 64)", length=64), turn("none"))
    longer = turn("dynamic(2, 64)", length=128)
    assert longer[0] == 1 and np.all(longer[1:] < turn("none")[1:])
    # the slowest pair turns as much over 2 x 128 - 64 positions as it did over 64
    np.testing.assert_allclose(longer[-1] * 3, turn("none")[-1], rtol=1e-12)
