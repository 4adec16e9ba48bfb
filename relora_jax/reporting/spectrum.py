"""Singular values and numerical rank of the summed update: in how many directions the kernels have moved.

    summed update = base now + scale * (lora_a @ lora_b) - base at the start of the low-rank phase

per kind of kernel and per layer, in float64, from the {path: array} of two checkpoints. For kernels trained
in full (the arms full and control) it is kernel now - kernel then.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from relora_jax.errors import UserError
from relora_jax.run.record import Run
from relora_jax.training import names

if TYPE_CHECKING:
    from relora_jax.checkpoint.variables import Variables

Model = Mapping[str, Any]  # {path: array}
Values = Float[np.ndarray, "layers side"]


def is_low_rank(model: Model, kind: str) -> bool:
    """Whether kernels of this kind are frozen bases with factors."""
    return names.factors(names.LAYERS[kind])[0] in model


def summed_updates(
    now: Model, then: Model, kind: str, *, scale: float, base_dtype: str, base_init: str = "keep"
) -> Iterator[Float[np.ndarray, "in out"]]:
    """base now + scale * (A @ B) - base then, layer by layer; base then is 0 if `base_init` is "zero".

    `then` holds the trained kernel that became the base: it is first rounded as `base_dtype` stores it.
    """
    layer = names.LAYERS[kind]
    kernel, start = now[names.kernel_of(layer)], then[names.kernel_of(layer)]
    if not is_low_rank(now, kind):
        yield from (w.astype(np.float64) - s.astype(np.float64) for w, s in zip(kernel, start, strict=True))
        return
    a, b = (now[path] for path in names.factors(layer))
    for n, w in enumerate(kernel):
        total = w.astype(np.float64)
        total += scale * np.matmul(a[n].astype(np.float64), b[n].astype(np.float64))
        yield total if base_init == "zero" else total - _as_base(start[n], base_dtype).astype(np.float64)


def spectra(
    now: Model, then: Model, *, scale: float, base_dtype: str, base_init: str = "keep"
) -> dict[str, Values]:
    """Singular values of the summed update by kind and layer, largest first; one kind at a time in memory."""
    options = {"scale": scale, "base_dtype": base_dtype, "base_init": base_init}
    return {
        kind: np.stack(
            [np.linalg.svd(w, compute_uv=False) for w in summed_updates(now, then, kind, **options)]
        )
        for kind in names.LAYERS
    }


def checkpoints(run: Run) -> tuple[Model, Model, int]:
    """(the newest model, that at the start of the low-rank phase, the update of the newest).

    UserError if one of them is missing.
    """
    from relora_jax.checkpoint.saved import updates_saved  # here: Orbax takes seconds to import, and
    from relora_jax.checkpoint.variables import variables_of  # a workdir without a run is rejected first

    start = run.low_rank_start
    saved = updates_saved(run.workdir)
    if start not in saved:
        raise UserError(f"the checkpoint at update {start:,}, where the measurement starts, is missing")
    if saved[-1] == start:
        raise UserError(
            f"no checkpoint after update {start:,}, where the measurement starts, has been saved yet"
        )
    return variables_of(run.workdir, saved[-1]), variables_of(run.workdir, start), saved[-1]


def of_run(run: Run, now: Model, then: Model) -> dict[str, Values]:
    """{kind: singular values of the summed update} of a run, between its `checkpoints`."""
    relora = run.config.relora
    base = {"base_dtype": relora.base_dtype, "base_init": relora.base_init}
    return spectra(now, then, scale=relora.alpha / relora.rank, **base)


def weights(variables: "Variables") -> dict[str, Values]:
    """Singular values of the kernels with their factors merged, by kind and layer, largest first."""
    return {
        kind: np.stack(
            [
                np.linalg.svd(np.asarray(w, np.float64), compute_uv=False)
                for w in variables.merged_layers(names.kernel_of(layer))
            ]
        )
        for kind, layer in names.LAYERS.items()
    }


def _as_base(kernel: np.ndarray, base_dtype: str) -> np.ndarray:
    """The kernel after a round trip through `base_dtype`."""
    import jax.numpy as jnp  # here: comparing runs needs no JAX

    from relora_jax.core import base

    kind = base.parse(base_dtype)
    return np.asarray(kind.read(kind.store(jnp.asarray(kernel))))


def rank(values: Values, tolerance: float) -> Int[np.ndarray, " layers"]:
    """Numerical rank per layer: singular values above both `tolerance` and the error of the SVD itself."""
    svd_error = values.max(axis=-1, keepdims=True) * values.shape[-1] * np.finfo(np.float64).eps
    return np.sum(values > np.maximum(tolerance, svd_error), axis=-1)


def below(values: Values, threshold: float = 0.1) -> int:
    """Number of singular values below `threshold`, summed over layers, as in the paper's table."""
    return int(np.sum(values < threshold))


def rounding(kernels: np.ndarray, *, base_dtype: str, writes: int) -> float:
    """Bound on singular values due to rounding: rms(spacing) * (sqrt(in) + sqrt(out)) * sqrt(writes).

    `writes` counts how often the kernels were rounded to `base_dtype` since the start (at merges, or at
    updates if they are trained). Each rounding leaves an independent error of half the spacing of the type or
    so per entry; a matrix of such errors has half this bound as its largest singular value. Smaller values
    mean nothing.
    """
    import jax.numpy as jnp

    from relora_jax.core import base

    spacing = (np.asarray(base.parse(base_dtype).spacing(jnp.asarray(w)), np.float32) for w in kernels)
    rms = float(np.sqrt(np.mean([np.mean(np.square(of_layer)) for of_layer in spacing])))
    rows, columns = kernels.shape[-2:]
    return rms * float(np.sqrt(rows) + np.sqrt(columns)) * float(np.sqrt(writes))
