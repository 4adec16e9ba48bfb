"""Compiles a run's programs for hardware that is not there, and says what fits and what it costs.

    python -m relora_jax.plan --config=configs/FILE.py --topology=CHIP:SHAPE [--slices=N] [--arms=full,relora]
        [--config.GROUP.FIELD=VALUE ...] [--search] [--json] [--markdown] [--picture=FILE.png]

--topology: v5e:4x4, v5p:2x2x2, v6e:4x4 (the extra tpu), h100:1, h100:8, h200:8 (the extra plan-cuda).
--slices: of that shape, joined by the data center's network; for GPUs, machines.
--search: also finds the largest microbatch that fits, in two to five more compilations of each arm.

No accelerator is started, and none is needed. A program takes from seconds to minutes to compile.
Exit codes: 0 also where something does not fit, 2 wrong setting.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.config import Config
from relora_jax.errors import UserError
from relora_jax.planning import arms, table
from relora_jax.planning.compiled import Compiler
from relora_jax.planning.topology import Topology, make_topology
from relora_jax.reporting import pictures
from relora_jax.validate import validate


def main(argv: Sequence[str]) -> int:
    """Prints the plan; returns the exit code."""
    flags = {"topology": "", "slices": "1", "arms": "full,relora", "picture": ""}
    switches = {"search": False, "json": False, "markdown": False}
    _, values = cli.parse(argv, **flags, **switches)
    if not values["topology"]:
        raise UserError("--topology is missing: pass --topology=v5e:4x4, h100:8 or another")
    if not values["arms"]:
        raise UserError("--arms is empty: pass --arms=full,relora or others")
    picture = Path(values["picture"]).expanduser() if values["picture"] else None
    if picture and not picture.parent.is_dir():
        raise UserError(f"--picture={picture}: the directory {picture.parent} does not exist")
    slices = cli.count("slices", values["slices"], at_least=1)
    topology = make_topology(values["topology"], slices=slices)
    configs = []
    for arm in values["arms"].split(","):
        config, _ = cli.parse(cli.with_arm(argv, arm), **flags, **switches)
        validate(config, devices=len(topology.devices), platform=topology.chip.platform)
        configs.append(config)
    plans = make_plans(configs, topology, search=values["search"])
    if values["json"]:
        print(json.dumps(table.as_json(plans), indent=2))
    else:
        print(table.markdown(plans) if values["markdown"] else table.text(plans))
    if picture:
        parts = {plan.config.arm: plan.update.memory._asdict() for plan in plans}
        pictures.memory(picture, parts, limit=topology.chip.memory_bytes)
    return 0


def make_plans(configs: Sequence[Config], topology: Topology, *, search: bool) -> list[arms.ArmPlan]:
    """A plan for each config; programs that they share are compiled once."""
    compiler = Compiler(topology)
    return [arms.plan(config, topology, compiler, search=search) for config in configs]


if __name__ == "__main__":
    cli.main(main, __doc__)
