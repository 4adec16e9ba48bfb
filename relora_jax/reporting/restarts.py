"""What restarts did, as a section of a run's report: from the rows `restart`, and the losses around them.

A spike's height is how far the training loss, as a mean of `SMOOTHED` logged updates, rises in the first half
of a cycle above its mean in the last quarter of the cycle before. Even without one, the largest of several
noisy means is above 0: a spike is clear from `CLEAR` times the noise on, and over once the loss is back.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from relora_jax import shapes
from relora_jax.reporting import pictures
from relora_jax.run.record import Run
from relora_jax.storage.location import AnyPath

BEFORE, AFTER = 0.25, 0.5  # of a cycle
SMOOTHED = 3  # logged updates
CLEAR = 4  # standard errors of their mean

TEXT = """\
What each restart did, measured on held-out rows.

- Change of logits: the largest one relative to the RMS of all logits, at most {change:.2g}; the base type,
  {base_dtype}, rounds to {rounding:.2g}.
- Cleared moments: {cleared:.1%} of the factors' on average; asked for: {asked:.1%}.
- Merged update: its norm over all kernels, and in how many directions it moved one (effective rank); r is
  {rank}.
- Overlap: the share of a merged update's space that lies in that of the one before; by chance {chance}.
- Loss spike: {spikes}
"""
SPIKES = """\
the training loss rose after {clear} of {count} restarts, by more than {times} times its noise of
  {noise:.3f} nats{heights}."""
HEIGHTS = " (in the median of these by {height:.3f} nats, and it was back after {recovery})"
NO_SPIKES = "too few updates are logged to see one; lower train.log_every_updates."


class Spike(NamedTuple):
    """The training loss after one restart."""

    update: int
    height: float  # nats above the loss before; below 0 if it never rose
    recovery: float  # updates until it was back from its highest; infinite: not in this cycle
    noise: float  # standard error of the smoothed loss

    @property
    def is_clear(self) -> bool:
        """Whether noise alone would hardly be so high."""
        return self.height > CLEAR * self.noise


def spikes(run: Run) -> list[Spike]:
    """One for each reset that has enough logged updates on both sides."""
    resets = [row["update"] for row in run.of("restart") if row["reset"]]
    losses, cycle = run.points("train", "loss"), run.config.relora.cycle_updates
    result = []
    for start, end in zip(resets, [*resets[1:], math.inf], strict=True):
        before = [loss for update, loss in losses if start - BEFORE * cycle < update <= start]
        after = _smoothed([point for point in losses if start < point[0] <= end])
        early = [(loss, update) for update, loss in after if update <= start + AFTER * cycle]
        if len(before) < SMOOTHED or not early:
            continue
        level, (highest, at) = statistics.mean(before), max(early)
        back = (update - start for update, loss in after if update >= at and loss <= level)
        noise = statistics.stdev(before) / math.sqrt(SMOOTHED)
        result.append(Spike(start, highest - level, next(back, math.inf), noise))
    return result


def section(run: Run, folder: AnyPath) -> list[str]:
    """The section and its picture, if there are measured restarts."""
    rows = [row for row in run.of("restart") if row.get("delta_norm") is not None]
    if not rows:
        return []
    seen, config = spikes(run), run.config
    pictures.restarts(folder / "restarts.png", rows, {spike.update: spike.height for spike in seen})
    known = lambda key: [row[key] for row in rows if row.get(key) is not None]  # noqa: E731
    values = {
        "change": max(row["logits_change"] / row["logits_rms"] for row in rows),
        "rounding": rows[0]["base_rounding"],
        "cleared": statistics.mean(known("moments_cleared") or [0]),
        "asked": statistics.mean(known("moments_asked") or [0]),
    }
    sides = sorted({side for kernel in shapes.target_kernels(config).values() for side in kernel})
    text = TEXT.format(
        **values,
        base_dtype=config.relora.base_dtype,
        rank=config.relora.rank,
        chance=" to ".join(
            f"{config.relora.rank / side:.2g}" for side in sorted({sides[-1], sides[0]}, reverse=True)
        ),
        spikes=_about(seen),
    )
    return [f"## Restarts\n\n{text}\n![Restarts](report/restarts.png)\n"]


def _about(seen: Sequence[Spike]) -> str:
    if not seen:
        return NO_SPIKES
    clear, heights = [spike for spike in seen if spike.is_clear], ""
    if clear:
        recovery = statistics.median_high([spike.recovery for spike in clear])
        back = f"{recovery:g} updates" if math.isfinite(recovery) else "more than a cycle"
        height = statistics.median([spike.height for spike in clear])
        heights = HEIGHTS.format(height=height, recovery=back)
    noise = statistics.median([spike.noise for spike in seen])
    return SPIKES.format(clear=len(clear), count=len(seen), times=CLEAR, noise=noise, heights=heights)


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(the last update, the mean loss) of every so many consecutive points."""
    return [
        (points[n + SMOOTHED - 1][0], statistics.mean(loss for _, loss in points[n : n + SMOOTHED]))
        for n in range(len(points) - SMOOTHED + 1)
    ]
