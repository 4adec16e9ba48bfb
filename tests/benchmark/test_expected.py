"""Columns compiled and not run, for one CPU that is said to be a chip."""

import jax
import pytest

from relora_jax.benchmark import expected
from relora_jax.errors import UserError
from relora_jax.planning.chips import CHIPS
from relora_jax.planning.compiled import Compiled, Compiler, Memory
from relora_jax.planning.hlo import Costs
from relora_jax.planning.kernels import Kernel
from relora_jax.planning.topology import Topology
from relora_jax.training.program import Program
from tests.support import small

CHIP = CHIPS["h100"]._replace(matmul_flops_per_s=1e9, memory_bytes_per_s=1e9)
TOPOLOGY = Topology("cpu", CHIP, jax.devices()[:1], 1)
COSTS = Costs(1.0, 0.0, ())
CONFIG = small.config("full", train__batch=4, train__microbatch=4)


def test_kernels_of_an_update_do_its_products_and_move_its_state() -> None:
    compiler = Compiler(TOPOLOGY)
    update = compiler(Program(CONFIG, small.mesh()), "full_rank_update")
    assert update.costs is not None
    assert sum(kernel.flops for kernel in update.kernels) == update.costs.matmul_flops
    state = update.memory.weights + update.memory.moments
    moved = sum(kernel.bytes for kernel in update.kernels)
    assert moved > 2 * state  # each weight and moment is read and written
    column = expected.column("full", CONFIG, TOPOLOGY, compiler)
    assert column.median_s == sum(max(k.flops, k.bytes) / 1e9 for k in update.kernels)
    others = [kernel.bytes for kernel in update.kernels if kernel.flops == 0]
    assert column.memory_bound_s == pytest.approx(sum(others) / 1e9) and others
    assert column.compiled_bytes == update.memory.total and column.restart_s is None
    assert column.mfu is not None and 0 < column.mfu < 1


def test_restart_has_a_roofline_too() -> None:
    kernels = {"low_rank_update": 5.0, "restart": 2.0}

    def compiler(program: Program, name: str) -> Compiled:
        return Compiled(Memory(1, 2, 3, 4), COSTS, "", (Kernel("k", 0.0, 1e9 * kernels[name]),))

    config = small.config("relora", relora__warm_start_updates=0)
    column = expected.column("relora", config, TOPOLOGY, compiler)
    assert (column.median_s, column.restart_s, column.compiled_bytes) == (5.0, 2.0, 10)


def test_update_that_does_not_compile_is_named_with_its_reason() -> None:
    refused = Compiled(Memory(1, 2, 3, 4), None, "too large")
    with pytest.raises(
        UserError, match=r"full does not compile for cpu \(too large\): use a smaller --micro"
    ):
        expected.column("full", CONFIG, TOPOLOGY, lambda *_: refused)
