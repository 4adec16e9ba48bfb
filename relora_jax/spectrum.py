"""How many directions the low-rank phase has moved the kernels in: singular values of the summed update.

    summed update = base now + scale lora_a lora_b - base at the start of the low-rank phase

per kind of kernel and per layer, in float64, from the {path: array} that a checkpoint holds. Where
nothing was frozen (the arms full and control) it is kernel now - kernel then.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int

KINDS = {
    **{kind: f"blocks/attention/{kind}" for kind in "qkvo"},
    **{kind: f"blocks/mlp/{kind}" for kind in ("gate", "up", "down")},
}

Model = Mapping[str, np.ndarray]
Values = Float[np.ndarray, "layers side"]


def is_low_rank(model: Model, kind: str) -> bool:
    """Whether the kernels of this kind are frozen bases with factors."""
    return f"{KINDS[kind]}/lora_a" in model


def summed_update(
    now: Model, then: Model, kind: str, layer: int, *, scale: float, base_init: str = "keep"
) -> Float[np.ndarray, "in out"]:
    """base now + scale A B - base then; the start's base is 0 where `base_init` is "zero"."""
    path = KINDS[kind]
    base = now[f"{path}/kernel"][layer]
    moved = base.astype(np.float64)
    if not is_low_rank(now, kind):
        return moved - then[f"{path}/kernel"][layer].astype(np.float64)
    factors = (now[f"{path}/{name}"][layer].astype(np.float64) for name in ("lora_a", "lora_b"))
    moved += scale * np.matmul(*factors)
    if base_init == "zero":
        return moved
    # the start's base is the checkpoint's kernel in the base's own dtype: `wrap` rounded it
    return moved - then[f"{path}/kernel"][layer].astype(base.dtype).astype(np.float64)


def spectra(now: Model, then: Model, *, scale: float, base_init: str = "keep") -> dict[str, Values]:
    """Singular values of the summed update, largest first, of each kind and layer; one layer in memory."""
    found = {}
    for kind, path in KINDS.items():
        layers = range(len(now[f"{path}/kernel"]))
        moved = (summed_update(now, then, kind, n, scale=scale, base_init=base_init) for n in layers)
        found[kind] = np.stack([np.linalg.svd(one, compute_uv=False) for one in moved])
    return found


def rank(values: Values, tolerance: float) -> Int[np.ndarray, " layers"]:
    """Numerical rank per layer: singular values above `tolerance` and above the decomposition's own error."""
    own_error = values.max(axis=-1, keepdims=True) * values.shape[-1] * np.finfo(np.float64).eps
    return np.sum(values > np.maximum(tolerance, own_error), axis=-1)


def below(values: Values, threshold: float = 0.1) -> int:
    """How many singular values lie below `threshold`, summed over layers, as the paper tabulates."""
    return int(np.sum(values < threshold))


def rounding(kernels: np.ndarray, *, writes: int) -> float:
    """eps rms(W) (sqrt(in) + sqrt(out)) sqrt(writes): a largest singular value that rounding alone can make.

    `writes` counts how often the kernels were rounded to their dtype since the start (merges, or updates
    where they are trained). Each leaves an error of at most eps |W| / 2 in every entry, independent of the
    others; a matrix of such errors has half this largest singular value. Smaller values tell nothing.
    """
    eps = float(np.spacing(np.ones((), kernels.dtype)))
    rms = float(np.sqrt(np.mean(np.square(kernels.astype(np.float32)))))
    rows, columns = kernels.shape[-2:]
    return eps * rms * float(np.sqrt(rows) + np.sqrt(columns)) * float(np.sqrt(writes))
