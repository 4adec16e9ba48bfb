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

--topology: nothing is run; memory, and the least time of the kernels by cause, compiled as by `plan`.
--peer=torch: also transformers' LlamaForCausalLM, for low-rank arms with PEFT's LoRA (the extra bench).
--input: rows and tokens per second that reach the devices from the disk, first cold, then warm.
"""

import dataclasses
import json
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relora_jax import cli
from relora_jax.benchmark import expected, measured, peer, reading, table
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
    "peer": "",
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
    if not values["arms"]:
        raise UserError("--arms is empty: pass --arms=full,relora or others")
    rounds = cli.count("rounds", values["rounds"], at_least=1)
    _check_peer(values)
    picture = Path(values["picture"]).expanduser() if values["picture"] else None
    if picture and not picture.parent.is_dir():
        raise UserError(f"--picture={picture}: the directory {picture.parent} does not exist")
    configs = _configs(argv, values)
    if values["topology"]:
        columns, facts = _compile(configs, values["topology"])
    else:
        columns, facts = _measure(configs, rounds=rounds, with_peer=bool(values["peer"]))
    if values["json"]:
        facts |= {
            "config": config.name,
            "command": shlex.join(["python", "-m", "relora_jax.bench", *argv[1:]]),
            "rows": columns[0].config.train.batch,
            "sequence_length": columns[0].config.data.sequence_length,
            "columns": [column.facts(columns[0]) for column in columns],
        }
        print(json.dumps(facts, indent=1))
    else:
        print(table.text(columns, device=facts["device"], compiled=facts["compiled"]))
    if picture:
        _draw(picture, columns)
    return 0


def _draw(picture: Path, columns: Sequence[Column]) -> None:
    splits = {column.name: column.memory._asdict() for column in columns if column.memory}
    if splits:
        pictures.causes(picture, {column.name: column.causes_s for column in columns}, splits)
        return
    steps = {column.name: (column.median_s, *column.quartiles_s) for column in columns}
    pictures.bench(picture, steps, {column.name: column.compiled_bytes for column in columns})


def _compile(configs: dict[str, Config], name: str) -> tuple[list[Column], dict[str, Any]]:
    """(columns, facts) of a topology."""
    topology = make_topology(name)
    for config in configs.values():
        validate(config, devices=len(topology.devices), platform=topology.chip.platform)
    compiler = Compiler(topology)
    columns = [expected.column(name, config, topology, compiler) for name, config in configs.items()]
    return columns, {"compiled": True, "device": topology.name, "versions": _versions()}


def _measure(
    configs: dict[str, Config], *, rounds: int, with_peer: bool
) -> tuple[list[Column], dict[str, Any]]:
    """(columns, facts) of this machine."""
    if with_peer:
        peer.share_gpu()
    devices = start_devices()
    for config in configs.values():
        validate(config, devices=len(devices))
        if with_peer:
            peer.check(config)
    enable_compilation_cache()
    ours = [measured.Ours(name, config) for name, config in configs.items()]
    measured.measure_peaks(ours)
    peers = _peers(configs) if with_peer else []
    columns = measured.alternate([*ours, *peers], rounds=rounds)
    device = f"{len(devices)} x {devices[0].device_kind}"
    facts = {"compiled": False, "device": device, "cores": os.cpu_count(), "versions": _versions()}
    for runner in peers:
        facts |= {"torch_threads": runner.facts["threads"]}
        facts["versions"] |= runner.facts["versions"]
    return columns, facts


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in ("jax", "jaxlib", "flax")}


def _check_peer(values: dict[str, Any]) -> None:
    if values["peer"] not in ("", "torch"):
        raise UserError(f"--peer={values['peer']} is not known: pass --peer=torch, or none")
    if values["peer"] and values["topology"]:
        raise UserError("--peer=torch is run, not compiled: omit it or --topology")


def _peers(configs: dict[str, Config]) -> list[peer.TorchPeer]:
    """PyTorch's column of each arm, with the dropout of the arm's first; LoRA's product is separate."""
    arms: dict[str, Config] = {}
    for config in configs.values():
        relora = dataclasses.replace(config.relora, product="separate")
        arms.setdefault(config.arm, dataclasses.replace(config, relora=relora))
    return [peer.TorchPeer(f"torch {arm}", config) for arm, config in arms.items()]


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
