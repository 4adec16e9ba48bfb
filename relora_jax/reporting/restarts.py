"""What restarts did, as a section of a run's report: from the rows `restart`, and the losses around them.

A spike is how far the training loss, as a mean of `SMOOTHED` logged updates, rises above its mean of the last
`BEFORE` of the cycle before the restart; it is over once the smoothed loss is back there.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from relora_jax import shapes
from relora_jax.reporting import pictures
from relora_jax.run.record import Run
from relora_jax.storage.location import AnyPath

BEFORE = 0.25  # of a cycle
SMOOTHED = 3  # logged updates

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
the training loss rose after {higher} of {count} restarts; the median height is {height:+.3f} nats,
  where noise is {noise:.3f}, and in the median it was back within {recovery}."""
NO_SPIKES = "too few updates are logged to see one; lower train.log_every_updates."


class Spike(NamedTuple):
    """The training loss after one restart."""

    update: int
    height: float  # nats above the loss before; below 0 if it never rose
    recovery: int | None  # updates until it was back; None: not in this cycle
    noise: float  # standard error of the smoothed loss


def spikes(run: Run) -> list[Spike]:
    """One for each reset that has enough logged updates on both sides."""
    resets = [row["update"] for row in run.of("restart") if row["reset"]]
    losses = run.points("train", "loss")
    window = max(1, round(BEFORE * run.config.relora.cycle_updates))
    result = []
    for start, end in zip(resets, [*resets[1:], math.inf], strict=True):
        before = [loss for update, loss in losses if start - window < update <= start]
        after = _smoothed([point for point in losses if start < point[0] <= end])
        if len(before) < SMOOTHED or not after:
            continue
        level = statistics.mean(before)
        recovery = next((update - start for update, loss in after if loss <= level), None)
        highest = max(loss for update, loss in after if recovery is None or update <= start + recovery)
        noise = statistics.stdev(before) / math.sqrt(SMOOTHED)
        result.append(Spike(start, highest - level, recovery, noise))
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
        chance=" to ".join(f"{config.relora.rank / side:.2g}" for side in {sides[-1], sides[0]}),
        spikes=_about(seen),
    )
    return [f"## Restarts\n\n{text}\n![Restarts](report/restarts.png)\n"]


def _about(seen: Sequence[Spike]) -> str:
    if not seen:
        return NO_SPIKES
    higher = [spike for spike in seen if spike.height > 0]
    back = [spike.recovery for spike in seen if spike.recovery is not None]
    median = f"{statistics.median(back):g} updates" if 2 * len(back) > len(seen) else "more than a cycle"
    return SPIKES.format(
        higher=len(higher),
        count=len(seen),
        height=statistics.median(spike.height for spike in seen),
        noise=statistics.median(spike.noise for spike in seen),
        recovery=median,
    )


def _smoothed(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """(the last update, the mean loss) of every so many consecutive points."""
    return [
        (points[n + SMOOTHED - 1][0], statistics.mean(loss for _, loss in points[n : n + SMOOTHED]))
        for n in range(len(points) - SMOOTHED + 1)
    ]
