"""Plans of several arms as one table: text for a terminal, Markdown for a page, JSON for programs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from relora_jax import shapes
from relora_jax.planning.arms import ArmPlan

NAMES = {
    "full_rank_update": "full-rank update",
    "start_low_rank": "start of the low-rank phase",
    "restart": "restart",
    "low_rank_update": "low-rank update",
}


def rows(plans: Sequence[ArmPlan]) -> list[list[str]]:
    """The table: a header, then a label and a cell for each plan."""
    table = [["", *(plan.config.arm for plan in plans)]]

    def row(label: str, cell: Callable[[ArmPlan], str]) -> None:
        table.append([label, *(cell(plan) for plan in plans)])

    row("parameters trained", lambda plan: f"{shapes.count(plan.config).trained:,}")
    row("parameters frozen", lambda plan: f"{shapes.count(plan.config).frozen:,}")
    for part in ("weights", "moments", "gradients", "temporaries"):
        row(f"{part} per device", lambda plan, part=part: gigabytes(getattr(plan.update.memory, part)))
    if any(plan.host_bytes for plan in plans):
        row("in the host's memory per device", lambda plan: gigabytes(plan.host_bytes))
    for name, label in NAMES.items():
        row(f"{label}", lambda plan, name=name: verdict(plan, name) if name in plan.programs else "-")
    row("most memory in", _peak)
    row("rematerialization", lambda plan: ", ".join(plan.remat.values()))
    row("largest microbatch", _largest)
    row("matmul FLOPs per token", _flops)
    row("sent within a slice, per update", lambda plan: _sent(plan, between=False))
    row("sent between slices, per update", lambda plan: _sent(plan, between=True))
    row("time per update, at least", _time)
    row("tokens per second, at most", _speed)
    return table


def text(plans: Sequence[ArmPlan]) -> str:
    """The table in aligned columns, with what it is of above it and remedies below it."""
    return "\n".join([title(plans[0]), *aligned(rows(plans)), *remedies(plans)])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns padded to their widest cells."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return [line.rstrip() for line in lines]


def markdown(plans: Sequence[ArmPlan]) -> str:
    """The table as Markdown."""
    header, *body = rows(plans)
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * len(plans)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in body)])


def title(plan: ArmPlan) -> str:
    """What the plan is of: config, topology, mesh, batch."""
    topology, train, mesh = plan.topology, plan.config.train, plan.config.mesh
    return (
        f"{plan.config.name} on {topology.name}: {len(topology.devices)} devices with "
        f"{gigabytes(topology.chip.memory_bytes)} for a program, mesh data {mesh.data} x fsdp {mesh.fsdp} x "
        f"tensor {mesh.tensor}, {train.batch} rows of {plan.config.data.sequence_length} in microbatches of "
        f"{train.microbatch}"
    )


def remedies(plans: Sequence[ArmPlan]) -> list[str]:
    """What to do about the programs that do not fit."""
    lines = []
    for plan in plans:
        failing = [name for name in plan.programs if not plan.fits(name)]
        if failing == ["full_rank_update"] and len(plan.programs) > 1:
            lines.append(
                f"{plan.config.arm}: only the warm start does not fit. Make it on other machines (arm full) "
                "and start from it: --config.train.init_from=RUN"
            )
        elif failing and not {"restart", "low_rank_update"} & {*failing} and len(plan.programs) > 1:
            lines.append(
                f"{plan.config.arm}: the low-rank phase fits, its start does not. Train elsewhere until "
                "a checkpoint after relora.warm_start_updates, and resume that here: the mesh may change"
            )
        elif failing:
            lines.append(
                f"{plan.config.arm}: does not fit. Use a smaller train.microbatch, model.remat=auto or full, "
                "a larger mesh.fsdp, or relora.base_dtype=bfloat16 or float8_e4m3"
            )
    return lines


def as_json(plans: Sequence[ArmPlan]) -> list[dict[str, Any]]:
    """The table and more as numbers: bytes, FLOPs and seconds of one device and one update."""
    return [_facts(plan) for plan in plans]


def gigabytes(count: float) -> str:
    """A number of bytes in GB (10^9), or MB and kB below one of them."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:.0f} B"


def verdict(plan: ArmPlan, name: str) -> str:
    """Whether a program fits, and by how much."""
    program, over = plan.programs[name], plan.over_bytes(name)
    total = gigabytes(program.memory.total)
    if over > 0:
        return f"OUT OF MEMORY: {total}, {gigabytes(over)} too much"
    if program.costs is None:
        return f"DOES NOT COMPILE: {program.refusal[:80]}"
    if not plan.fits(name):
        return f"{total}, only by computing {program.costs.recomputed_flops:.1e} FLOPs again"
    return f"fits: {total}, {gigabytes(-over)} left"


def _peak(plan: ArmPlan) -> str:
    return NAMES[max(plan.programs, key=lambda name: plan.programs[name].memory.total)]


def _largest(plan: ArmPlan) -> str:
    return {None: "not searched", 0: "none fits"}.get(plan.largest_microbatch, f"{plan.largest_microbatch}")


def _flops(plan: ArmPlan) -> str:
    if plan.flops_per_token is None:
        return "-"
    ratio = plan.flops_per_token / plan.model_flops_per_token
    return f"{plan.flops_per_token:.3e} ({ratio:.3f} x the model's {plan.model_flops_per_token:.3e})"


def _sent(plan: ArmPlan, *, between: bool) -> str:
    if plan.update.costs is None:
        return "-"
    sizes = plan.update.costs.bytes_by_kind(between=between)
    parts = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in sorted(sizes.items()))
    return f"{gigabytes(sum(sizes.values()))} ({parts})" if sizes else "nothing"


def _time(plan: ArmPlan) -> str:
    if not plan.seconds:
        return "-"
    limit = max(plan.seconds, key=lambda name: plan.seconds[name])
    return f"{plan.seconds[limit]:.3g} s ({limit})"


def _speed(plan: ArmPlan) -> str:
    tokens = plan.config.train.batch * plan.config.data.sequence_length
    return f"{tokens / max(plan.seconds.values()):,.0f}" if plan.seconds else "-"


def _facts(plan: ArmPlan) -> dict[str, Any]:
    train, counts = plan.config.train, shapes.count(plan.config)
    return {
        "config": plan.config.name,
        "arm": plan.config.arm,
        "topology": plan.topology.name,
        "devices": len(plan.topology.devices),
        "mesh": dataclasses.asdict(plan.config.mesh),
        "batch": train.batch,
        "microbatch": train.microbatch,
        "largest_microbatch": plan.largest_microbatch,
        "parameters": {"trained": counts.trained, "frozen": counts.frozen},
        "host_bytes": plan.host_bytes,
        "memory_bytes": plan.topology.chip.memory_bytes,
        "flops_per_token": plan.flops_per_token,
        "model_flops_per_token": plan.model_flops_per_token,
        "seconds": plan.seconds,
        "chip": plan.topology.chip._asdict(),
        "programs": {
            name: {
                "fits": plan.fits(name),
                "remat": plan.remat.get(name),
                "bytes": program.memory._asdict() | {"total": program.memory.total},
                "refusal": program.refusal,
                "matmul_flops": program.costs and program.costs.matmul_flops,
                "recomputed_flops": program.costs and program.costs.recomputed_flops,
                "sent_within_bytes": program.costs and program.costs.bytes_by_kind(between=False),
                "sent_between_bytes": program.costs and program.costs.bytes_by_kind(between=True),
            }
            for name, program in plan.programs.items()
        },
    }
