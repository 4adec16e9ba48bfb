"""Times a run's programs: an update of each arm in turn, on the same synthetic rows, with a restart's share.

    python -m relora_jax.bench --config=configs/FILE.py [--arms=full,relora] [--product=separate,fused]
        [--microbatch=M] [--rounds=10] [--config.GROUP.FIELD=VALUE ...] [--json] [--picture=FILE.png]
        [--topology=CHIP:SHAPE | --peer=torch]
    python -m relora_jax.bench --input --config=configs/FILE.py [--seconds=5]

An update here is of one microbatch of M rows (by default train.microbatch) with its optimizer step, so that
it runs anywhere; a run's update has train.batch / M of them and one optimizer step. A low-rank arm is timed
in its low-rank phase. --product: a column of low-rank arms for each form; the fused one is without dropout.
Step: median and quartiles of --rounds; ratios are medians of the ratios within a round. MFU: the model's
FLOPs over the chip's peak in bfloat16, "-" where planning/chips.py does not know the chip. A restart's share
is of a cycle of such updates. Memory: what the compiler says that the update needs and, where devices tell,
what they held.

--topology: nothing is run; memory and the least time of the kernels, compiled as by `plan`.
--peer=torch: also transformers' LlamaForCausalLM, for low-rank arms with PEFT's LoRA (the extra bench).
--input: rows and tokens per second that reach the devices from the disk, first cold, then warm.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relora_jax import cli
from relora_jax.benchmark import expected, measured, reading, table
from relora_jax.benchmark.column import Column
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.data import prepared
from relora_jax.data.stores import PrepareOptions
from relora_jax.errors import UserError
from relora_jax.planning.compiled import Compiler
from relora_jax.planning.topology import make_topology
from relora_jax.reporting import pictures
from relora_jax.training.program import enable_compilation_cache
from relora_jax.training.sharding import start_devices
from relora_jax.validate import validate

FLAGS: dict[str, Any] = {
    "arms": "full,relora",
    "product": "",
    "microbatch": "",
    "rounds": "10",
    "topology": "",
    "seconds": "5",
    "picture": "",
    "json": False,
    "input": False,
}


def main(argv: Sequence[str]) -> int:
    """Prints the table, or how fast rows are read; returns the exit code."""
    config, values = cli.parse(argv, **FLAGS)
    if values["input"]:
        return _read(config, values["seconds"], argv)
    rounds = cli.count("rounds", values["rounds"], at_least=1)
    if not values["arms"]:
        raise UserError("--arms is empty: pass --arms=full,relora or others")
    picture = Path(values["picture"]).expanduser() if values["picture"] else None
    if picture and not picture.parent.is_dir():
        raise UserError(f"--picture={picture}: the directory {picture.parent} does not exist")
    configs = _configs(argv, values)
    if values["topology"]:
        topology = make_topology(values["topology"])
        device, count = topology.name, len(topology.devices)
        for config in configs.values():
            validate(config, devices=count, platform=topology.chip.platform)
        compiler = Compiler(topology)
        columns = [expected.column(name, config, topology, compiler) for name, config in configs.items()]
    else:
        device, count = start_devices()[0].device_kind, len(start_devices())
        for config in configs.values():
            validate(config, devices=count)
        enable_compilation_cache()
        ours = [measured.Ours(name, config) for name, config in configs.items()]
        measured.measure_peaks(ours)
        columns = measured.alternate(ours, rounds=rounds)
    _show(columns, values, picture, argv, device={"kind": device, "count": count, "cores": os.cpu_count()})
    return 0


def _show(
    columns: Sequence[Column],
    values: dict[str, Any],
    picture: Path | None,
    argv: Sequence[str],
    *,
    device: dict[str, Any],
) -> None:
    compiled = bool(values["topology"])
    if values["json"]:
        facts = {
            "config": columns[0].config.name,
            "command": shlex.join(["python", "-m", "relora_jax.bench", *argv[1:]]),
            "versions": {name: version(name) for name in ("relora-jax", "jax", "jaxlib", "flax")},
            "device": device,
            "rows": columns[0].config.train.batch,
            "sequence_length": columns[0].config.data.sequence_length,
            "compiled": compiled,
        }
        print(json.dumps(facts | {"columns": [column.facts(columns[0]) for column in columns]}, indent=1))
    else:
        label = device["kind"] if compiled else f"{device['count']} x {device['kind']}"
        print(table.text(columns, device=label, compiled=compiled))
    if picture:
        steps = {column.name: (column.median_s, *column.quartiles_s) for column in columns}
        pictures.bench(picture, steps, {column.name: column.compiled_bytes for column in columns})


def _configs(argv: Sequence[str], values: dict[str, Any]) -> dict[str, Config]:
    """{column's name: config} of each arm, and of each product of low-rank arms."""
    configs: dict[str, Config] = {}
    for arm in values["arms"].split(","):
        config, _ = cli.parse(cli.with_arm(argv, arm), **FLAGS)
        default = str(config.train.microbatch)
        rows = cli.count("microbatch", values["microbatch"] or default, at_least=1)
        low_rank = arm in LOW_RANK_ARMS
        products = values["product"].split(",") if values["product"] and low_rank else [config.relora.product]
        for product in products:
            dropout = config.relora.dropout if product == "separate" else 0.0
            configs[f"{arm} {product}" if low_rank else arm] = dataclasses.replace(
                config,
                train=dataclasses.replace(config.train, batch=rows, microbatch=rows, init_from=""),
                relora=dataclasses.replace(
                    config.relora, product=product, dropout=dropout, warm_start_updates=0
                ),
            )
    return configs


def _read(config: Config, seconds: str, argv: Sequence[str]) -> int:
    validate(config, devices=len(start_devices()))
    try:
        limit_s = float(seconds)
    except ValueError:
        raise UserError(f"--seconds={seconds} is not a number") from None
    store = prepared.prepare(config.data, PrepareOptions(command=cli.command("prepare", argv))).train
    for label, speed in reading.speeds(config, store, seconds=limit_s).items():
        print(f"{label}: {speed:,.0f} rows/s, {speed * store.sequence_length:,.0f} tokens/s")
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
