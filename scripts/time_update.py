"""python scripts/time_update.py --config=configs/quickstart.py [--rounds=20]

Times one update of `full` and of `relora` with both forms of the product, alternating in one process, on
random ids. Prints the median time of each and its median ratio to `full` in the same round, then JSON.
"""

import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from relora_jax import cli
from relora_jax.config import Config
from relora_jax.data.batches import Batch
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh, start_devices
from relora_jax.validate import validate


def main(argv: Sequence[str]) -> int:
    """Times the updates and prints the table; returns the exit code."""
    config, strings = cli.parse(argv, rounds="20")
    rounds = cli.count("rounds", strings["rounds"], at_least=1)
    validate(config, devices=len(start_devices()))
    variants = {
        "full": dataclasses.replace(config, arm="full"),
        "relora separate": _with(config, product="separate"),
        "relora fused": _with(config, product="fused", dropout=0.0),
    }
    updates = {name: _update(variant) for name, variant in variants.items()}
    rounds_s = [{name: update() for name, update in updates.items()} for _ in range(rounds)]
    tokens = config.train.batch * config.data.sequence_length
    rows = {}
    for name in variants:
        median = statistics.median(times[name] for times in rounds_s)
        ratio = statistics.median(times[name] / times["full"] for times in rounds_s)
        rows[name] = {"ms": round(1e3 * median, 1), "to_full": round(ratio, 3)}
        print(f"{name:14} {1e3 * median:8.1f} ms  {ratio:6.3f} of full  {tokens / median:10,.0f} tokens/s")
    facts = {"config": config.name, "device": str(jax.devices()[0]), "machine": platform.machine()}
    facts |= {name: version(name) for name in ("jax", "flax")}
    print(json.dumps(facts | {"rounds": rounds, "updates": rows}))
    return 0


def _with(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, arm="relora", relora=dataclasses.replace(config.relora, **changes))


def _update(config: Config) -> Callable[[], float]:
    """A compiled and warmed-up function that runs one update and returns its time in seconds."""
    program = Program(config, make_mesh(data=-1, fsdp=1, tensor=1, devices=jax.devices()))
    shape = (config.accumulation, config.train.microbatch)
    ids = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (*shape, config.data.sequence_length + 1)
    )
    lengths = np.full(shape, ids.shape[-1], np.int32)
    batch = Batch(*(jax.device_put(array, program.rows) for array in (ids.astype(np.int32), lengths)))
    state = [program.init() if config.arm == "full" else program.start_low_rank(program.init())]

    def update() -> float:
        start = time.perf_counter()
        state[0], values = program.train_step(state[0], batch, 1e-4)
        values["loss"].block_until_ready()
        return time.perf_counter() - start

    update()
    update()
    return update


if __name__ == "__main__":
    cli.main(main, __doc__)
