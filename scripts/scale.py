"""python scripts/scale.py [--topologies=h100:1,v5e:4x4,...] [--again] [--search]

Plans 350m, 1b and 7b, full against relora, on each of these machines, and writes docs/scale.md. Plans are
kept in benchmarks/scale/: those that exist are taken from there unless --again is passed, so an interrupted
run continues where it stopped. --search: with the largest microbatch, in several more compilations of each.
"""

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from relora_jax import cli, plan
from relora_jax.planning import table
from relora_jax.planning.topology import make_topology
from relora_jax.validate import validate

ROOT = Path(__file__).parents[1]
PAGE, PLANS = ROOT / "docs/scale.md", ROOT / "benchmarks/scale"
START = "<!-- written by scripts/scale.py -->\n"
ARMS = ("full", "relora")


class Machine(NamedTuple):
    """A topology, its mesh, and the rows that each device computes at once."""

    title: str
    topology: str
    slices: int
    data: int
    fsdp: int
    rows: dict[str, int]


MACHINES = [
    Machine("One H100", "h100:1", 1, 1, 1, {"350m": 16, "1b": 8, "7b": 2}),
    Machine("Eight H100 of one machine", "h100:8", 1, 1, 8, {"350m": 16, "1b": 8, "7b": 2}),
    Machine("TPU v5e, 4 x 4", "v5e:4x4", 1, 1, 16, {"350m": 4, "1b": 2, "7b": 1}),
    Machine("TPU v5e, 16 x 16", "v5e:16x16", 1, 16, 16, {"350m": 4, "1b": 2, "7b": 1}),
    Machine("Two slices of TPU v5p, 2 x 2 x 2 each", "v5p:2x2x2", 2, 2, 8, {"350m": 8, "1b": 8, "7b": 4}),
]


def main(argv: Sequence[str]) -> int:
    """Makes the plans that are missing, then the page; returns the exit code."""
    values = cli.options(argv, topologies=",".join(m.topology for m in MACHINES), again=False, search=False)
    wanted = values["topologies"].split(",")
    for machine in (m for m in MACHINES if m.topology in wanted):
        for size in machine.rows:
            file = _file(machine, size)
            if values["again"] or not file.exists():
                print(f"planning {size} on {machine.title}", flush=True)
                facts = {"jax": version("jax"), "compiled on": platform.machine()}
                plans = _plans(machine, size, search=values["search"])
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps({**facts, "plans": plans}, indent=1) + "\n")
    before = PAGE.read_text().partition(START)[0]
    PAGE.write_text(before + START + "\n" + "\n\n".join(map(_section, MACHINES)) + "\n")
    return 0


def command(machine: Machine, size: str) -> list[str]:
    """The command line that makes one plan."""
    devices = machine.data * machine.fsdp
    microbatch = machine.rows[size] * devices
    arguments = [f"--config=configs/{size}.py", f"--topology={machine.topology}"]
    arguments += [f"--slices={machine.slices}"] * (machine.slices > 1)
    arguments += [f"--config.mesh.data={machine.data}", f"--config.mesh.fsdp={machine.fsdp}"]
    if devices == 256:  # whose multiples the published batches are not
        arguments.append(f"--config.train.batch={2048 if size == '1b' else 1024}")
    return ["relora_jax.plan", *arguments, f"--config.train.microbatch={microbatch}"]


def _plans(machine: Machine, size: str, *, search: bool) -> list[dict[str, Any]]:
    topology = make_topology(machine.topology, slices=machine.slices)
    argv, configs = command(machine, size), []
    for arm in ARMS:
        config, _ = cli.parse(cli.with_arm(argv, arm), topology="", slices="")
        validate(config, devices=len(topology.devices), platform=topology.chip.platform)
        configs.append(config)
    return table.as_json(plan.make_plans(configs, topology, search=search))


def _file(machine: Machine, size: str) -> Path:
    name = machine.topology.replace(":", "-") + f"-x{machine.slices}" * (machine.slices > 1)
    return PLANS / f"{size}-{name}.json"


def _section(machine: Machine) -> str:
    """The table of one machine, with the command of each size below it."""
    columns, commands = [list(LABELS)], []
    for size in machine.rows:
        commands.append(f"python -m {' '.join(command(machine, size))}")
        if _file(machine, size).exists():
            columns += map(_cells, json.loads(_file(machine, size).read_text())["plans"])
    if len(columns) == 1:
        lines = [f"## {machine.title}", "", "Not planned yet; the commands:"]
        return "\n".join([*lines, "", *_block(commands)])
    header, *body = zip(*columns, strict=True)
    lines = [f"## {machine.title}", "", f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(columns) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in body if set(row[1:]) != {"-"}]
    return "\n".join([*lines, "", *_block(commands)])


def _block(commands: list[str]) -> list[str]:
    reason = "<!-- not run: takes minutes, and needs the extras tpu and plan-cuda -->"
    return [reason, "```bash", *commands, "```"]


LABELS = (
    *("", "rows of a microbatch, of an update", "weights", "moments", "gradients", "temporaries", "update"),
    *("its warm start", "start of its low-rank phase", "restart", "largest microbatch"),
    *("matmul FLOPs per token", "of the model's count", "sent within a slice", "sent between slices"),
    "least time per update",
)


def _cells(facts: dict[str, Any]) -> list[str]:
    """The column of one plan: a cell for each of LABELS."""
    programs, memory = facts["programs"], facts["memory_bytes"]
    update = list(programs.values())[-1]
    parts = [
        table.gigabytes(update["bytes"][part]) for part in ("weights", "moments", "gradients", "temporaries")
    ]
    others = [programs.get(name) for name in ("full_rank_update", "start_low_rank", "restart")]
    others = others if facts["arm"] == "relora" else [None] * 3
    sent = [update[f"sent_{where}_bytes"] for where in ("within", "between")]
    flops, seconds = facts["flops_per_token"], facts["seconds"]
    limit = max(seconds, key=lambda name: seconds[name]) if seconds else ""
    return [
        f"{facts['config']} {facts['arm']}",
        f"{facts['microbatch']:,}, {facts['batch']:,}",
        *parts,
        *(_verdict(program, memory) for program in (update, *others)),
        "-" if facts["largest_microbatch"] is None else f"{facts['largest_microbatch']:,}",
        f"{flops:.3g}" if flops else "-",
        f"{flops / facts['model_flops_per_token']:.2f} x" if flops else "-",
        *("-" if not size else table.gigabytes(sum(size.values())) for size in sent),
        f"{seconds[limit]:.2f} s ({limit})" if seconds else "-",
    ]


def _verdict(program: dict[str, Any] | None, memory_bytes: float) -> str:
    if program is None:
        return "-"
    over = program["bytes"]["total"] - memory_bytes
    if over > 0:
        return f"**{table.gigabytes(over)} too much**"
    if program["refusal"]:
        return "does not compile"
    return f"{table.gigabytes(-over)} left" if program["fits"] else "only by computing again"


if __name__ == "__main__":
    cli.main(main, __doc__)
