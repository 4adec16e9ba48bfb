"""A plan's figures, with CPU devices in place of a topology, and its search."""

import dataclasses
from typing import Any

import jax
import pytest

from relora_jax import shapes
from relora_jax.errors import UserError
from relora_jax.planning import arms
from relora_jax.planning.arms import ArmPlan
from relora_jax.planning.chips import CHIPS
from relora_jax.planning.compiled import Compiled, Compiler, Memory
from relora_jax.planning.hlo import Collective, Costs
from relora_jax.planning.topology import Topology
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh
from tests.support import small

CHIP = CHIPS["v5e"]._replace(memory_bytes=1e9)
COSTS = Costs(2e12, 0.0, (Collective("all-gather", 3e9, 0), Collective("all-reduce", 1e9, 2e9)))


def topology(devices: int = 1, slices: int = 1, **changes: float) -> Topology:
    return Topology("cpu", CHIP._replace(**changes), jax.devices()[:devices], devices // slices)


def compiled(total: float, *, costs: Costs | None = COSTS, fixed: float = 0.0) -> Compiled:
    return Compiled(Memory(fixed, 0.0, 0.0, total - fixed), costs)


@pytest.mark.parametrize(
    ("arm", "product", "remat"),
    [
        pytest.param("full", "separate", "none", marks=pytest.mark.slow),
        ("relora", "separate", "none"),
        pytest.param("relora", "fused", "none", marks=pytest.mark.slow),
        pytest.param("full", "separate", "dots", marks=pytest.mark.slow),
        pytest.param("relora", "separate", "dots", marks=pytest.mark.slow),
        ("relora", "fused", "dots"),
    ],
)
def test_compiled_matmul_flops_are_those_of_the_model(arm: str, product: str, remat: str) -> None:
    # xla: einsum leaves out products that the mask hides
    changes = {"relora__product": product, "model__remat": remat, "model__attention": "xla"}
    config = small.config(arm, relora__warm_start_updates=0, **changes)
    name = arms.program_names(config)[-1]
    program = Program(config, make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))
    plan = ArmPlan(config, topology(), {name: Compiler(topology())(program, name)}, None)
    # fused: A @ B, once a microbatch of 4 rows
    targets = shapes.target_kernels(config).values()
    once = 2 * 2 * sum(m * n * config.relora.rank for m, n in targets) * config.model.layers
    extra = once / (config.train.microbatch * config.data.sequence_length) if product == "fused" else 0
    if (
        remat == "none"
    ):  # with its layers unrolled, XLA keeps A @ B for the backward pass and both microbatches
        extra /= 2 * config.accumulation
    if remat == "dots":  # attention is computed again, but no product with a kernel
        extra += 4 * config.data.sequence_length * config.model.hidden * config.model.layers
    assert plan.flops_per_token is not None
    assert plan.flops_per_token - plan.model_flops_per_token == pytest.approx(extra)


@pytest.mark.slow
def test_memory_is_that_of_the_shards() -> None:
    config = small.config("full", mesh__data=2, mesh__fsdp=4, train__microbatch=8)
    devices = topology(8, slices=2)
    plan = arms.plan(config, devices, Compiler(devices), search=False)
    parameters = shapes.count(config).trained
    weights, moments, gradients, temporaries = plan.update.memory
    assert weights == gradients
    assert parameters / 4 * 4 < weights < parameters / 4 * 4 * 1.2  # the norms are on every device
    assert moments == pytest.approx(2 * weights, rel=0.02)
    assert temporaries > 0
    reduced = plan.update.costs.bytes_by_kind(between=True)  # type: ignore[union-attr]
    assert sum(reduced.values()) == pytest.approx(weights, rel=0.1)  # ring of 2: its size, once a microbatch


def test_programs_of_each_arm() -> None:
    start, update = ["start_low_rank"], ["low_rank_update"]
    names = {arm: arms.program_names(small.config(arm)) for arm in ("full", "lora", "lora_warm", "relora")}
    assert names == {
        "full": ["full_rank_update"],
        "lora": start + update,
        "lora_warm": ["full_rank_update", *start, *update],
        "relora": ["full_rank_update", *start, "restart", *update],
    }
    assert arms.program_names(small.config(train__init_from="run")) == [*start, "restart", *update]


def test_plan_chooses_the_policy_of_each_update() -> None:
    needs = {"dots": 2e9, "full": 1.5e9}
    asked: list[tuple[str, str]] = []

    class Counting(Compiler):
        def __call__(self, program: Program, name: str) -> Compiled:
            policy = program.config.model.remat
            asked.append((name, policy))
            return compiled(needs[policy] if name == "full_rank_update" else 0.9e9)

    plan = arms.plan(small.config("lora_warm"), topology(), Counting(topology()), search=False)
    assert plan.remat == {"full_rank_update": "full", "low_rank_update": "dots"}
    assert plan.programs["full_rank_update"].memory.total == 1.5e9
    assert asked.count(("start_low_rank", "auto")) == 1
    config = small.config("lora_warm", model__remat="dots")
    plan = arms.plan(config, topology(), Counting(topology()), search=False)
    assert set(plan.remat.values()) == {"dots"}


def test_equal_programs_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compilations: list[Any] = []
    monkeypatch.setattr(
        "relora_jax.planning.compiled._compile",
        lambda compile_program, *_: compilations.append(compile_program) or (1e6, COSTS, "", ()),
    )
    compiler = Compiler(topology())
    for arm in ("full", "lora_warm"):
        arms.plan(small.config(arm), topology(), compiler, search=False)
    assert len(compilations) == 3  # the warm start of lora_warm is the update of full


@pytest.mark.parametrize(
    ("message", "state_counts"),
    [
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity", False),
        ("the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).", True),
    ],
)
def test_program_refused_for_its_memory_is_a_verdict(
    message: str, state_counts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {message}")

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    config = small.config("full", train__batch=1, train__microbatch=1)
    plan = arms.plan(config, topology(), Compiler(topology()), search=True)
    assert not plan.fits("full_rank_update")
    memory = plan.update.memory
    state = memory.weights + memory.moments if state_counts else 0
    assert plan.over_bytes("full_rank_update") == pytest.approx(20.5 * 2**30 + state - 1e9, abs=1)
    assert (plan.flops_per_token, plan.seconds, plan.largest_microbatch) == (None, {}, 0)


def test_compiler_that_jaxlib_cannot_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreadable:
        def as_text(self) -> str:
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: Unreadable())
    with pytest.raises(UserError, match=r"^jaxlib cannot read .*install the version that jax asks for"):
        arms.plan(small.config("full"), topology(), Compiler(topology()), search=False)


@pytest.mark.parametrize("limit", [0, 4, 5, 8, 12, 20, 59, 60, 1000])
@pytest.mark.parametrize("start", [4, 20, 60])
def test_search_finds_the_largest_microbatch_that_fits(limit: int, start: int) -> None:
    config = small.config("full", train__batch=60, train__microbatch=start)
    tried = []

    def program(microbatch: int) -> Compiled:
        tried.append(microbatch)
        total = 0.4e9 + 0.6e9 * microbatch / (limit + 0.5)
        return compiled(total, fixed=0.4e9, costs=None if total > 2e9 else COSTS)

    largest = arms.largest_microbatch(config, topology(4), program)
    assert largest == max((m for m in (4, 12, 20, 60) if m <= limit), default=0)
    assert len(set(tried)) == len(tried) <= 3


def test_recomputing_is_not_fitting() -> None:
    again = dataclasses.replace(COSTS, recomputed_flops=1.0)
    assert arms.fits(compiled(0.9e9), CHIP)
    assert not arms.fits(compiled(0.9e9, costs=again), CHIP)
    assert not arms.fits(compiled(1.1e9), CHIP)
    assert not arms.fits(compiled(0.9e9, costs=None), CHIP)


def test_least_time_is_the_longest_of_what_an_update_does() -> None:
    chip = CHIP._replace(matmul_flops_per_s=1e12, slice_bytes_per_s=1e9, network_bytes_per_s=1e8)
    seconds = arms.roofline_s(COSTS, chip)
    assert seconds == {"matrix products": 2, "collectives within": 4, "collectives between": 20}
    plan = ArmPlan(small.config("full"), topology(), {"full_rank_update": compiled(1e6)}, None)
    assert max(plan.seconds, key=lambda name: plan.seconds[name]) == "collectives between"
