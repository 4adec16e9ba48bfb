"""Columns compiled and not run, for one CPU that is said to be a chip."""

import re
from typing import Any

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
CONFIG = small.config("full", train__batch=4, train__microbatch=4, model__remat="none")


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
    products = [max(kernel.flops, kernel.bytes) for kernel in update.kernels if kernel.flops]
    assert column.causes_s["matrix products"] == pytest.approx(sum(products) / 1e9) and products
    assert sum(column.causes_s.values()) == pytest.approx(column.median_s)
    assert column.causes_s["norm"] > 0 and column.causes_s["optimizer"] > 0
    assert column.memory == update.memory and column.compiled_bytes == update.memory.total
    assert column.restart_s is None
    assert column.mfu is not None and 0 < column.mfu < 1


def test_innermost_scope_of_a_kernel_is_its_cause() -> None:
    sources = {
        "jit(f)/transpose(jvp(mlp))/dropout/mul": 1.0,
        "jit(f)/mlp/jit(silu)/mul": 2.0,
        "jit(f)/add": 4.0,
    }
    kernels = [Kernel(source, 0.0, 1e9 * size, source=source) for source, size in sources.items()]
    kernels.append(Kernel("dot", 8e9, 1.0, source="jit(f)/mlp/dot_general"))
    causes = {cause: seconds for cause, seconds in expected.causes_s(kernels, CHIP).items() if seconds}
    assert causes == {"matrix products": 8.0, "mlp": 2.0, "dropout": 1.0, "other": 4.0}


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"relora__dropout": 0.1, "relora__base_dtype": "int8"}, {"fused"}),
        ({"relora__product": "fused"}, {"dropout", "rounding"}),
    ],
)
def test_every_scope_is_in_an_update(changes: dict[str, Any], absent: set[str]) -> None:
    text = Program(small.config(**changes), small.mesh()).lower("low_rank_update").as_text(debug_info=True)
    assert {scope for scope in expected.SCOPES if re.search(rf'["/(]{scope}[/)]', text)} == {
        *expected.SCOPES
    } - absent


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
