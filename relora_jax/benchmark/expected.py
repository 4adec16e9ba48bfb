"""Columns compiled for a topology that is not there: memory, and the roofline of the compiled kernels."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from relora_jax.benchmark.column import Column
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.errors import UserError
from relora_jax.planning.arms import compiled_as_run
from relora_jax.planning.chips import Chip
from relora_jax.planning.compiled import Compiled
from relora_jax.planning.kernels import Kernel, roofline_s
from relora_jax.planning.topology import Topology
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh

PRODUCTS, OTHER = "matrix products", "other"
# as `jax.named_scope` names them in the model, the low-rank layers and the update
SCOPES = (
    *("norm", "rope", "attention", "mlp", "fused", "dropout", "rounding"),
    *("embedding", "loss", "optimizer"),
)


def column(name: str, config: Config, topology: Topology, compiler: Any) -> Column:
    """The column of a config, by a `Compiler`; UserError if its update does not compile."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=topology.devices)
    chip, low_rank = topology.chip, config.arm in LOW_RANK_ARMS
    name_of_update = "low_rank_update" if low_rank else "full_rank_update"
    _, update = compiled_as_run(config, topology, compiler, mesh, name_of_update)
    if update.costs is None:
        raise UserError(
            f"{name} does not compile for {topology.name} ({update.refusal}): use a smaller --microbatch"
        )
    restart: Compiled | None = compiler(Program(config, mesh), "restart") if config.arm == "relora" else None
    return Column(
        name,
        config,
        chip.matmul_flops_per_s * len(topology.devices),
        (roofline_s(update.kernels, chip),),
        restart_s=roofline_s(restart.kernels, chip) if restart and restart.kernels else None,
        causes_s=causes_s(update.kernels, chip),
        memory=update.memory,
        compiled_bytes=update.memory.total,
    )


def causes_s(kernels: Sequence[Kernel], chip: Chip) -> dict[str, float]:
    """The seconds of the kernels of each cause: PRODUCTS, one of SCOPES, the innermost, or OTHER.

    Of a kernel in which XLA has fused several, the last instruction decides.
    """
    seconds: dict[str, float] = dict.fromkeys((PRODUCTS, *SCOPES, OTHER), 0.0)
    for kernel in kernels:
        scopes = [word for word in re.findall(r"\w+", kernel.source) if word in SCOPES]
        cause = PRODUCTS if kernel.flops else [OTHER, *scopes][-1]
        seconds[cause] += kernel.seconds(chip)
    return seconds
