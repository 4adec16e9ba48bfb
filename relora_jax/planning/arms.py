"""The plan of one arm on a topology: what each of its programs needs, and what an update costs.

Time per update >= max(FLOPs / peak, bytes sent / bandwidth): what the hardware allows, not what it will do.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from relora_jax import shapes
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.planning.chips import Chip
from relora_jax.planning.compiled import Compiled, Compiler, Memory, host_bytes
from relora_jax.planning.hlo import Costs
from relora_jax.planning.topology import Topology
from relora_jax.training import remat
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class ArmPlan:
    """One column of the table. `programs`: those that the arm runs, the update of its last phase last."""

    config: Config
    topology: Topology
    programs: dict[str, Compiled]
    largest_microbatch: int | None  # that fits, of the last phase's update; None: not searched, 0: none does
    # {update: policy of rematerialization}: `model.remat`, or what "auto" stands for
    remat: dict[str, str] = dataclasses.field(default_factory=dict)
    host_bytes: float = 0.0  # in the memory of the hosts, per device

    @property
    def update(self) -> Compiled:
        """The update of the last phase."""
        return list(self.programs.values())[-1]

    def over_bytes(self, name: str) -> float:
        """How much more than the chip's memory a program needs; negative is what remains."""
        return self.programs[name].memory.total - self.topology.chip.memory_bytes

    def fits(self, name: str) -> bool:
        """Whether a program compiles and fits, without computing anything again to save memory."""
        return fits(self.programs[name], self.topology.chip)

    @property
    def flops_per_token(self) -> float | None:
        """FLOPs of the compiled update's matrix products per token; None if it does not compile."""
        costs = self.update.costs
        tokens = self.config.train.batch * self.config.data.sequence_length
        return costs and costs.matmul_flops * len(self.topology.devices) / tokens

    @property
    def model_flops_per_token(self) -> int:
        """The same from the model's shapes."""
        return shapes.matmul_flops_per_token(self.config, low_rank=self.config.arm in LOW_RANK_ARMS)

    @property
    def seconds(self) -> dict[str, float]:
        """{what an update spends time on: the least seconds}; empty if it does not compile."""
        return roofline_s(self.update.costs, self.topology.chip) if self.update.costs else {}


def plan(config: Config, topology: Topology, compiler: Compiler, *, search: bool) -> ArmPlan:
    """Compiles the programs of the config's arm; with `search`, also the largest microbatch that fits."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices)
    names = program_names(config)
    compiled = {name: compiled_as_run(config, topology, compiler, mesh, name) for name in names}
    programs = {name: program for name, (_, program) in compiled.items()}
    largest = None
    if search:

        def update(microbatch: int) -> Compiled:
            train = dataclasses.replace(config.train, microbatch=microbatch)
            changed = dataclasses.replace(config, train=train)
            return compiled_as_run(changed, topology, compiler, mesh, names[-1])[1]

        largest = largest_microbatch(config, topology, update)
    policies = {name: policy for name, (policy, _) in compiled.items() if name.endswith("_update")}
    return ArmPlan(config, topology, programs, largest, policies, host_bytes(Program(config, mesh)))


def compiled_as_run(
    config: Config, topology: Topology, compiler: Callable[[Program, str], Compiled], mesh: Any, name: str
) -> tuple[str, Compiled]:
    """(policy of rematerialization, program `name`): `model.remat`, or what a run on the topology takes."""

    def program(policy: str) -> Compiled:
        model = dataclasses.replace(config.model, remat=policy)
        return compiler(Program(dataclasses.replace(config, model=model), mesh), name)

    policy = config.model.remat
    if policy == "auto" and name.endswith("_update"):
        policy = remat.chosen(lambda policy: fits(program(policy), topology.chip))
    return policy, program(policy)


def program_names(config: Config) -> list[str]:
    """The programs that a run of this config uses, the update of its last phase last."""
    if config.arm not in LOW_RANK_ARMS:
        return ["full_rank_update"]
    warm = config.low_rank_start > 0 and not config.train.init_from
    restarts = ["restart"] if config.arm == "relora" else []
    return ["full_rank_update"] * warm + ["start_low_rank", *restarts, "low_rank_update"]


def fits(compiled: Compiled, chip: Chip) -> bool:
    """Whether a program compiles and fits, without computing anything again to save memory."""
    if compiled.costs is None or compiled.costs.recomputed_flops:
        return False
    return compiled.memory.total <= chip.memory_bytes


def largest_microbatch(config: Config, topology: Topology, compiled: Any) -> int:
    """The largest divisor m of the batch, shared evenly, for which `compiled(m)` fits; 0 if there is none.

    Temporaries grow with the microbatch, so that each program compiled says where to look next.
    """
    devices, batch = len(topology.devices), config.train.batch
    sizes = [m for m in range(devices, batch + 1, devices) if batch % m == 0]
    largest, smallest = -1, len(sizes)  # indices: the largest that fits, the smallest that does not
    guess = max((i for i, m in enumerate(sizes) if m <= config.train.microbatch), default=0)
    while smallest - largest > 1:
        program = compiled(sizes[guess])
        if fits(program, topology.chip):
            largest = guess
        else:
            smallest = guess
        size = _fitting(program.memory, sizes[guess], topology.chip)
        guess = sum(m <= size for m in sizes) - 1
        guess = min(max(guess, largest + 1), smallest - 1)
    return sizes[largest] if largest >= 0 else 0


def _fitting(memory: Memory, microbatch: int, chip: Chip) -> float:
    """The microbatch that would fill the memory if temporaries were proportional to it."""
    free = chip.memory_bytes - (memory.total - memory.temporaries)
    return microbatch * free / memory.temporaries if memory.temporaries else 0


def roofline_s(costs: Costs, chip: Chip) -> dict[str, float]:
    """{what an update spends time on: the least seconds of it}."""
    within, between = (sum(costs.bytes_by_kind(between=between).values()) for between in (False, True))
    return {
        "matrix products": costs.matmul_flops / chip.matmul_flops_per_s,
        "collectives within": within / chip.slice_bytes_per_s,
        "collectives between": between / chip.network_bytes_per_s,
    }
