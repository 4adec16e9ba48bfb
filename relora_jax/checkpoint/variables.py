"""Reads single variables of a checkpoint, each verified, so that the model never has to fit into memory.

A variable is named as in the model ("blocks/attention/q/kernel"); a base kernel W is converted from its
base_dtype. Shapes: W [layers, in, out], A [layers, in, r], B [layers, r, out].
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relora_jax.checkpoint.saved import Checkpoint, checkpoints_dir
from relora_jax.core import base
from relora_jax.core.merge import delta
from relora_jax.storage.location import AnyPath
from relora_jax.training import names


class Variables(Mapping[str, Any]):
    """{path: array} of one checkpoint, on the host. DamagedError if one is not as it was saved."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._specs = checkpoint, checkpoint.specs
        self._device = jax.local_devices()[0]

    @property
    def low_rank(self) -> bool:
        """Whether the checkpoint is from the low-rank phase."""
        return any(map(names.is_frozen, self._specs))

    def has_factors(self, path: str) -> bool:
        """Whether the kernel has unmerged factors."""
        return names.frozen(path) in self._specs and not names.is_factor(path)

    def __contains__(self, path: object) -> bool:
        return not {names.frozen(str(path)), names.trained(str(path))}.isdisjoint(self._specs)

    def __iter__(self) -> Iterator[str]:
        paths = {names.in_model(path) for path in self._specs if not names.is_moment(path)}
        return (path for path in sorted(paths) if path in self and not self._is_part(path))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, path: str) -> np.ndarray:
        """The variable; for a base kernel, W without its factors."""
        if not self.has_factors(path):
            return self._read_model(path)
        layer = names.layer_of(path)
        frozen = [name for name in filter(names.is_frozen, self._specs) if not names.is_factor(name)]
        parts = [name for name in frozen if names.layer_of(names.in_model(name)) == layer]
        with jax.default_device(self._device):
            stored = {name.rpartition("/")[2]: jnp.asarray(self._read(name)) for name in parts}
            return np.asarray(base.parse(self._checkpoint.config.relora.base_dtype).read(stored))

    def factors(self, path: str) -> tuple[np.ndarray, np.ndarray]:
        """(A, B) of a kernel with factors."""
        a, b = names.factors(names.layer_of(path))
        return self._read_model(a), self._read_model(b)

    def merged_layers(self, path: str) -> Iterator[np.ndarray]:
        """The layers of a stacked kernel with its factors merged, in at least float32."""
        kernel = self[path]
        if not self.has_factors(path):
            yield from kernel
            return
        relora = self._checkpoint.config.relora
        a, b = self.factors(path)
        with jax.default_device(self._device):
            for w_l, a_l, b_l in zip(kernel, a, b, strict=True):
                product = delta(jnp.asarray(a_l), jnp.asarray(b_l), relora.alpha / relora.rank)
                yield np.asarray(jnp.asarray(w_l).astype(product.dtype) + product)

    def _is_part(self, path: str) -> bool:
        """Whether the path is an extra array that a base kernel is stored with (quantization scales, say)."""
        return self.has_factors(path) and path != names.kernel_of(names.layer_of(path))

    def _read_model(self, path: str) -> np.ndarray:
        """A variable as it is stored, whether it is trained or frozen."""
        trained = names.trained(path)
        return self._read(trained if trained in self._specs else names.frozen(path))

    def _read(self, path: str) -> np.ndarray:
        shape, dtype = self._specs[path]
        sharding = jax.sharding.SingleDeviceSharding(self._device)
        like = {path: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)}
        return np.asarray(self._checkpoint.read(like, whole=False)[path])


def variables_of(workdir: AnyPath, update: int) -> Variables:
    """The variables of a run's checkpoint after `update` updates."""
    return Variables(Checkpoint.open(checkpoints_dir(workdir) / str(update)))
