"""restarts: the height and length of loss spikes that are built in, and the section about restarts."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from relora_jax.reporting import restarts
from relora_jax.run import record
from tests.support.reports import CYCLE, RANK, START, UPDATES, figures, make, text_of  # noqa: F401

RESTARTS = range(START + CYCLE, UPDATES, CYCLE)


def rows(
    *, high: float, length: int, delay: int = 0, noise: float = 0.0, every: int = 2, seed: int = 0
) -> list[dict[str, Any]]:
    """Losses that fall by 0.01 in each cycle, with a spike of this height and length after each restart."""
    random, lines = (
        np.random.default_rng(0),
        [{"kind": "eval", "update": 0, "loss": 6.0, "perplexity": 403.0}],
    )
    for u in range(1, UPDATES + 1):
        if u - 1 in RESTARTS:
            facts = {"logits_change": 3e-6, "logits_rms": 3.0, "base_rounding": 2**-23}
            facts |= {"moments_cleared": 0.75, "moments_asked": 0.8, "delta_norm": 2.0, "effective_rank": 2.5}
            facts |= {"overlap_in": 0.25, "overlap_out": None}
            lines.append({"kind": "restart", "update": u - 1, "merged": True, "reset": True, **facts})
        if u % every == 0:
            since = (u - 1 - START) % CYCLE if u - 1 >= RESTARTS[0] else CYCLE
            loss = 3 - 0.01 * ((u - 1 - START) // CYCLE) + (high if delay <= since < delay + length else 0.0)
            row = {"loss": loss + noise * random.standard_normal(), "lr": 1e-3, "grad_norm": 1.0, "mfu": None}
            row |= {
                "tokens_seen": 256 * u,
                "tokens_per_s": 4e3,
                "restarts": 0,
                "skipped": 0,
                "elapsed_s": 1.0,
            }
            lines.append({"kind": "train", "update": u, **row})
    return lines


def spikes(folder: Path, **built: Any) -> list[restarts.Spike]:
    return restarts.spikes(record.read(make(folder, lines=rows(**built))))


def test_spike_has_the_height_and_length_that_it_was_built_with(tmp_path: Path) -> None:
    seen = spikes(tmp_path, high=0.4, length=20)
    assert [spike.update for spike in seen] == list(RESTARTS)
    for spike in seen:
        np.testing.assert_allclose(spike.height, 0.4 - 0.01, rtol=1e-9)
        assert spike.recovery == 20 + 2 * restarts.SMOOTHED  # the smoothed loss leaves it so much later
    assert max(spike.noise for spike in seen) < 1e-9


def test_loss_that_goes_on_falling_has_no_spike(tmp_path: Path) -> None:
    seen = spikes(tmp_path, high=0.0, length=0)
    assert len(seen) == len(RESTARTS) and not any(spike.is_clear for spike in seen)
    assert max(spike.height for spike in seen) < 0


def test_spike_that_lasts_is_not_over(tmp_path: Path) -> None:
    first = spikes(tmp_path, high=0.4, length=CYCLE)[0]
    assert first.recovery == np.inf and first.height > 0.38


def test_spike_may_come_some_updates_after_the_restart(tmp_path: Path) -> None:
    late = spikes(tmp_path, high=0.4, length=20, delay=6, noise=0.02)
    assert all(spike.is_clear and abs(spike.height - 0.39) < 0.05 for spike in late)
    assert all(26 <= spike.recovery <= 36 for spike in late)


def test_noise_is_hardly_taken_for_spikes(tmp_path: Path) -> None:
    seen = [spikes(tmp_path / str(seed), high=0.0, length=0, noise=0.3, seed=seed) for seed in range(40)]
    clear = [spike.is_clear for of_run in seen for spike in of_run]
    assert len(clear) == 40 * len(RESTARTS) and np.mean(clear) < 0.1


def test_noise_is_that_of_the_smoothed_loss(tmp_path: Path) -> None:
    noise = [spike.noise for spike in spikes(tmp_path, high=0.0, length=0, noise=0.3)]
    np.testing.assert_allclose(np.mean(noise), 0.3 / np.sqrt(restarts.SMOOTHED), rtol=0.3)


def test_report_says_and_draws_what_restarts_did(tmp_path: Path, figures: dict[str, Figure]) -> None:  # noqa: F811
    text = text_of(make(tmp_path, lines=rows(high=0.4, length=20)))
    section = re.search(r"## Restarts\n(.*?)\n## ", text, re.S)
    assert section and "at most 1e-06" in section[1] and "rounds to 1.2e-07" in section[1]
    assert "75.0% of" in section[1] and "asked for: 80.0%" in section[1] and f"r is\n  {RANK}." in section[1]
    count = len(RESTARTS)
    assert f"after {count} of {count} restarts, by more than {restarts.CLEAR} times" in section[1]
    assert "by 0.390 nats, and it was back after 26 updates" in section[1]
    axes = figures["restarts.png"].axes
    heights = [line.get_ydata() for line in axes[3].lines]
    np.testing.assert_allclose(heights, [[0.39] * count])
    np.testing.assert_allclose(axes[0].lines[0].get_ydata(), 1e-6)


def test_rarely_logged_losses_show_no_spikes(tmp_path: Path) -> None:
    text = text_of(make(tmp_path, lines=rows(high=0.4, length=20, every=50)))
    assert "lower train.log_every_updates" in text


@pytest.mark.parametrize("arm", ("relora", "full"))
def test_runs_without_measured_restarts_have_no_section(tmp_path: Path, arm: str) -> None:
    assert "## Restarts" not in text_of(make(tmp_path, arm=arm))
