"""Learning-rate multiplier, merges and resets as pure functions of s, the updates done in a phase.

Plain Python numbers, so no schedule keeps its own count. The phase has T updates. The jagged schedule is
ReLoRA's (arXiv 2307.05695): a cosine that drops to 0 at each reset and warms up again over a few updates.
"""

import math


def cosine(s: int, *, total: int, warm_up: int, min_lr_ratio: float) -> float:
    """C(s) = m + (1 - m)(1 + cos(pi (s - w0) / (T - w0))) / 2, with min_lr_ratio m and warm-up w0."""
    return (
        min_lr_ratio
        + (1 - min_lr_ratio) * (1 + math.cos(math.pi * (s - warm_up) / max(total - warm_up, 1))) / 2
    )


def multiplier(
    s: int, *, total: int, warm_up: int, min_lr_ratio: float, cycle: int = 0, restart_warm_up: int = 0
) -> float:
    """Learning-rate multiplier of update s: a linear warm-up, then a cosine with a dip at each reset.

    s / w0 during the warm-up, then C(s), except (k / wr) C(n R + wr) in the first wr updates of each later
    cycle n (k = s mod R). total, warm_up, cycle and restart_warm_up are T, w0, R and wr, in updates; cycle=0
    disables the dips.
    """
    if s < warm_up:
        return s / warm_up
    k = s % cycle if cycle else 0
    if cycle and s >= cycle and k < restart_warm_up:
        return (
            k
            / restart_warm_up
            * cosine(s - k + restart_warm_up, total=total, warm_up=warm_up, min_lr_ratio=min_lr_ratio)
        )
    return cosine(s, total=total, warm_up=warm_up, min_lr_ratio=min_lr_ratio)


def is_merge(s: int, *, cycle: int, merges_per_cycle: int = 1) -> bool:
    """Whether update s of the low-rank phase begins with a merge: s > 0 and s mod (R / merges) = 0."""
    return s > 0 and s % (cycle // merges_per_cycle) == 0


def is_reset(s: int, *, cycle: int) -> bool:
    """Whether the merge of update s also resets the factors' statistics: s > 0 and s mod R = 0."""
    return s > 0 and s % cycle == 0
