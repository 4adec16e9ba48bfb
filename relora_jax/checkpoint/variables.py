"""The way in for single variables: each read and verified by itself, so that no model lies in memory whole.

A variable is named as in the model ("blocks/attention/q/kernel"); a frozen kernel is W as its base type reads
it. Shapes: [layers, in, out] W, [layers, in, r] A, [layers, r, out] B.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relora_jax.checkpoint.saved import Saved, checkpoints_dir
from relora_jax.core import base
from relora_jax.core.merge import delta
from relora_jax.training import names


class Variables(Mapping[str, Any]):
    """{path: array} of one checkpoint, on the host. DamagedError where one is not as it was saved."""

    def __init__(self, saved: Saved) -> None:
        self._saved, self._kinds = saved, saved.kinds()
        self._device = jax.local_devices()[0]

    @property
    def low_rank(self) -> bool:
        """Whether the checkpoint is of the low-rank phase."""
        return any(map(names.is_frozen, self._kinds))

    def has_factors(self, path: str) -> bool:
        """Whether the kernel has live factors."""
        return names.frozen(path) in self._kinds

    def __contains__(self, path: object) -> bool:
        return self.has_factors(str(path)) or names.trained(str(path)) in self._kinds

    def __iter__(self) -> Iterator[str]:
        held = {names.in_model(path) for path in self._kinds if not names.is_moment(path)}
        return (path for path in sorted(held) if path in self and not self._is_part(path))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, path: str) -> np.ndarray:
        """The variable; for a frozen kernel W without its factors."""
        if not self.has_factors(path):
            return self._read(names.trained(path))
        layer = names.layer_of(path)
        held = [
            name
            for name in self._kinds
            if names.is_frozen(name) and names.layer_of(names.in_model(name)) == layer
        ]
        with jax.default_device(self._device):
            stored = {name.rpartition("/")[2]: jnp.asarray(self._read(name)) for name in held}
            return np.asarray(base.parse(self._saved.config.relora.base_dtype).read(stored))

    def factors(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) of a kernel that has them."""
        a, b = names.factors(names.layer_of(path))
        return self._read(names.trained(a)), self._read(names.trained(b))

    def merged_layers(self, path: str) -> Iterator[np.ndarray]:
        """The layers of a stacked kernel, its live factors merged: in at least float32."""
        kernel = self[path]
        if not self.has_factors(path):
            yield from kernel
            return
        relora = self._saved.config.relora
        a, b = self.factors(path)
        with jax.default_device(self._device):
            for w_l, a_l, b_l in zip(kernel, a, b, strict=True):
                step = delta(jnp.asarray(a_l), jnp.asarray(b_l), relora.alpha / relora.rank)
                yield np.asarray(jnp.asarray(w_l).astype(step.dtype) + step)

    def _is_part(self, path: str) -> bool:
        """Whether the name is of a part that a kernel is stored as, beside the kernel's own."""
        return self.has_factors(path) and path != names.kernel_of(names.layer_of(path))

    def _read(self, path: str) -> np.ndarray:
        shape, dtype = self._kinds[path]
        here = jax.sharding.SingleDeviceSharding(self._device)
        like = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=here)}
        return np.asarray(self._saved.read(like, whole=False)[path])


def variables_of(workdir: Path, update: int) -> Variables:
    """The variables of a run's checkpoint after so many updates."""
    return Variables(Saved.open(checkpoints_dir(workdir) / str(update)))
