"""A checkpoint's variables read one at a time and verified: the model never lies in memory whole.

A variable is named as in the model ("blocks/attention/q/kernel"). Where a kernel has live factors, it is
W + scale A B, as `unwrap` has it, or W alone. Shapes: [layers, in, out] W, [layers, in, r] A,
[layers, r, out] B.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from relora_jax.merge import delta
from relora_jax.saved import Saved


class Weights:
    """The variables of one checkpoint, on the host. DamagedError where one is not as it was saved."""

    def __init__(self, saved: Saved) -> None:
        self._saved, self._kinds = saved, saved.kinds()
        self._here = jax.local_devices(backend="cpu")[0]

    @property
    def low_rank(self) -> bool:
        """Whether the checkpoint is of the low-rank phase."""
        return any(path.startswith("frozen/") for path in self._kinds)

    def has_factors(self, path: str) -> bool:
        """Whether the kernel has live factors."""
        return f"frozen/{path}" in self._kinds

    def variable(self, path: str) -> np.ndarray:
        """The variable without its live factors: W, where it has some."""
        return self._read(f"frozen/{path}" if self.has_factors(path) else f"trained/{path}")

    def factors(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) of a kernel that has them."""
        stem = f"trained/{path.rpartition('/')[0]}"
        return self._read(f"{stem}/lora_a"), self._read(f"{stem}/lora_b")

    def merged_layers(self, path: str) -> Iterator[np.ndarray]:
        """The layers of a stacked kernel, its live factors merged: in at least float32."""
        kernel = self.variable(path)
        if not self.has_factors(path):
            yield from kernel
            return
        relora = self._saved.config.relora
        a, b = self.factors(path)
        with jax.default_device(self._here):
            for w_l, a_l, b_l in zip(kernel, a, b, strict=True):
                step = delta(jnp.asarray(a_l), jnp.asarray(b_l), relora.alpha / relora.rank)
                yield np.asarray(jnp.asarray(w_l).astype(step.dtype) + step)

    def _read(self, path: str) -> np.ndarray:
        shape, dtype = self._kinds[path]
        here = jax.sharding.SingleDeviceSharding(self._here)
        like = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=here)}
        return np.asarray(self._saved.read(like, whole=False)[path])
