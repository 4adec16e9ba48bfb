"""A run's programs compiled for a topology: a device's memory by purpose, and what one run of each costs."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo

from relora_jax.errors import UserError
from relora_jax.planning.hlo import Costs, costs
from relora_jax.planning.kernels import Kernel, kernels
from relora_jax.planning.topology import Topology
from relora_jax.training.program import Program
from relora_jax.training.remat import used_bytes

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one device, by purpose."""

    weights: float
    moments: float
    gradients: float
    temporaries: float  # activations, padding, the batch, the program itself

    @property
    def total(self) -> float:
        """The sum of all four."""
        return sum(self)


class Compiled(NamedTuple):
    """What the compiler says of one program; if it refuses, the costs are None and `refusal` is its reason.

    `memory.temporaries` of a program that is refused for its memory are what it would need, as far as known.
    """

    memory: Memory
    costs: Costs | None
    refusal: str = ""
    kernels: tuple[Kernel, ...] = ()


class Compiler:
    """Compiles programs for one topology; equal programs are compiled once."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._compiled: dict[str, Any] = {}

    def __call__(self, program: Program, name: str) -> Compiled:
        """The program `name`, one of training.program.PROGRAMS."""
        low_rank = name in ("restart", "low_rank_update")
        state = program.low_rank_on_devices if low_rank else program.full_rank_on_devices
        weights, moments = device_bytes((state.trained, state.frozen)), device_bytes(state.opt_state)
        gradients = device_bytes(state.trained) if name.endswith("_update") else 0.0
        known = Memory(weights, moments, gradients, 0.0)
        with _target_has_cudnn():
            lowered = program.lower(name)
        text = lowered.as_text()
        if text not in self._compiled:
            self._compiled[text] = _compile(lowered.compile, self.topology.slice_size, weights + moments)
        used, *rest = self._compiled[text]
        if name in ("start_low_rank", "restart") and self.topology.chip.platform == "cuda":
            used -= host_bytes(program)  # without a GPU, its compiler knows no memory but the device's
        return Compiled(known._replace(temporaries=max(used - known.total, 0.0)), *rest)


@contextlib.contextmanager
def _target_has_cudnn() -> Iterator[None]:
    """JAX asks for the version of a local cuDNN even if it compiles for another machine: there, 9.13."""
    asked = fused_attention_stablehlo.check_cudnn_version
    fused_attention_stablehlo.check_cudnn_version = lambda: 91300
    try:
        yield
    finally:
        fused_attention_stablehlo.check_cudnn_version = asked


def _compile(
    compile_program: Callable[[], Any], slice_size: int, state_bytes: float
) -> tuple[float, Costs | None, str, tuple[Kernel, ...]]:
    """(bytes of a device, costs, why the compiler refuses the program, kernels)."""
    try:
        compiled = compile_program()
    except jax.errors.JaxRuntimeError as error:
        return _needed_bytes(str(error), state_bytes), None, " ".join(str(error).split())[:200], ()
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError as error:  # libtpu newer than jaxlib
        raise UserError(
            "jaxlib cannot read what this version of the compiler writes "
            f"({str(error).splitlines()[0][:120]}): install the version that jax asks for "
            "(pip install 'relora-jax[tpu]', or plan-cuda)"
        ) from error
    return float(used_bytes(compiled)), costs(text, slice_size=slice_size), "", kernels(text)


def _needed_bytes(message: str, state_bytes: float) -> float:
    """The memory that a refused program needs, from the compiler's message; 0 if it does not say."""
    for pattern, beside in (
        (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", 0.0),
        (r"required for HLO temporaries \(([\d.]+)([KMGT])\)", state_bytes),
    ):
        if match := re.search(pattern, message):
            return float(match[1]) * UNITS[match[2]] + beside
    return 0.0


def host_bytes(program: Program) -> float:
    """What a run keeps in the memory of the hosts, per device."""
    return device_bytes(program.low_rank_on_devices.master)


def device_bytes(tree: Any) -> float:
    """The bytes of one device's shards."""
    shapes = ((leaf.sharding.shard_shape(leaf.shape), leaf.dtype) for leaf in jax.tree.leaves(tree))
    return float(sum(math.prod(shape) * _bits(dtype) / 8 for shape, dtype in shapes))


def _bits(dtype: Any) -> int:
    """The bits of an element on a device; NumPy gives int4 a byte."""
    return 4 if dtype == jnp.int4 else 8 * dtype.itemsize
