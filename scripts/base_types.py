"""python scripts/base_types.py --config=configs/2m.py --workdir=DIR [--seeds=3] [--json=FILE]
    [--config.GROUP.FIELD=VALUE ...]

What the storage of the base kernels costs: trains once per seed with each base type, with and without a
master in float32, in runs below DIR, and compares the last validation loss of each with that of float32 at
the same seed. Started again, it continues. Use --config.relora.product=separate: 8-bit types compute
products in 8 bits only in that form.
"""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from relora_jax import cli
from relora_jax.core import base
from relora_jax.run import metrics_file

REFERENCE = "float32"
KINDS = [kind for kind in base.CHOICES if kind not in (REFERENCE, "float64")]
TYPES = {REFERENCE: (REFERENCE, "none")} | {
    kind + " with a master" * (master == "host"): (kind, master)
    for kind in KINDS
    for master in ("none", "host")
}


def main(argv: Sequence[str]) -> int:
    """Trains what is missing, and prints the table after each seed; returns the exit code."""
    own = {"seeds": "3", "json": "", "workdir": "runs/base_types"}
    config, values = cli.parse(argv, **own)
    seeds = cli.count("seeds", values["seeds"], at_least=1)
    settings = [arg for arg in argv[1:] if not arg.startswith(tuple(f"--{name}=" for name in own))]
    losses: dict[str, list[float]] = {name: [] for name in TYPES}
    for seed in range(seeds):
        for name, (kind, master) in TYPES.items():
            folder = Path(values["workdir"]) / f"{kind}-{master}-{seed}"
            flags = [f"--config.relora.base_dtype={kind}", f"--config.relora.base_master={master}"]
            flags += [f"--config.train.seed={seed}", f"--workdir={folder}"]
            command = [sys.executable, "-m", "relora_jax.train", *settings, *flags]
            if code := subprocess.run(command).returncode:
                return code  # it has said why
            losses[name].append(last_loss(folder))
        table = compared(losses)
        for name, row in table.items():
            print(f"{name:26} {row['perplexity']:8.2f}  {row['to_float32']:+.4f} +- {row['spread']:.4f} nats")
        if values["json"]:
            facts = {"command": f"python scripts/base_types.py {' '.join(argv[1:])}", "config": config.name}
            facts |= {package: version(package) for package in ("jax", "flax")}
            content = json.dumps(facts | {"seeds": seed + 1, "types": table}, indent=2)
            Path(values["json"]).write_text(f"{content}\n")
    return 0


def last_loss(folder: Path) -> float:
    """The last validation loss of a run, in nats."""
    return [row["loss"] for row in metrics_file.read(folder) if row["kind"] == "eval"][-1]


def compared(losses: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """{type: its perplexity (of the mean loss) and how far its loss is from float32's at the same seed}."""
    table = {}
    for name, own in losses.items():
        off = [loss - other for loss, other in zip(own, losses[REFERENCE], strict=True)]
        table[name] = {
            "perplexity": math.exp(statistics.mean(own)),
            "to_float32": statistics.mean(off),
            "spread": statistics.stdev(off) if len(off) > 1 else math.nan,
            "losses": own,
        }
    return table


if __name__ == "__main__":
    cli.main(main, __doc__)
