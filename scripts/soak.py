"""python scripts/soak.py --config=configs/2m.py [--config.GROUP.FIELD=VALUE ...] --workdir=DIR

Trains like relora_jax.train, but waits for each update, and measures the memory of the process over the
updates, the updates at which something compiles, and the time of an update after a save against the others.
"""

import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relora_jax import cli, train
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.config import Config
from relora_jax.errors import UserError
from relora_jax.training import steps
from relora_jax.training.program import Program

COMPILED = "/jax/core/compile/backend_compile_duration"  # also recorded on a cache hit


class Watch:
    """Measurements by update; wraps `Program.train_step` and `Checkpoints.save`."""

    def __init__(self) -> None:
        self.update_s: dict[int, float] = {}  # of update u
        self.save_s: dict[int, float] = {}  # how long the save at u blocked the loop
        self.rss_mb: dict[int, float] = {}
        self.compiled: Counter[int] = Counter()
        self.u = 0
        self._step, self._save = Program.train_step, Checkpoints.save
        setattr(Program, "train_step", lambda program, *args: self.step(program, *args))  # noqa: B010
        setattr(Checkpoints, "save", lambda *args, **kwargs: self.save(*args, **kwargs))  # noqa: B010
        jax.monitoring.register_event_duration_secs_listener(self.on_event)

    def step(self, program: Program, state: Any, batch: Any, learning_rate: float) -> Any:
        """Runs one update and times it from its call until its result is ready."""
        self.u = int(state.update)
        jax.block_until_ready((state, batch))
        since = time.perf_counter()
        result = jax.block_until_ready(self._step(program, state, batch, learning_rate))
        self.update_s[self.u] = time.perf_counter() - since
        self.u += 1
        self.rss_mb[self.u] = resident_mb()
        return result

    def save(self, checkpoints: Checkpoints, u: int, state: Any, **kwargs: Any) -> None:
        """Saves, and times how long training is blocked."""
        since = time.perf_counter()
        self._save(checkpoints, u, state, **kwargs)
        self.save_s[u] = time.perf_counter() - since

    def on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        """Counts a compiled program."""
        del duration_secs
        if event == COMPILED:
            self.compiled[self.u] += 1


def main(argv: Sequence[str]) -> int:
    """Trains and prints the measurements as text and as JSON; returns the exit code of the training."""
    config, strings = cli.parse(argv, workdir="")
    if not strings["workdir"] or Path(strings["workdir"]).exists():
        raise UserError(
            f"--workdir={strings['workdir']} must be new: the run is measured from its first update"
        )
    watch = Watch()
    code = train.main(argv)
    figures = summary(config, watch)
    for key, value in figures.items():
        print(f"{key:32} {value}")
    print(json.dumps(figures))
    return code


def summary(config: Config, watch: Watch) -> dict[str, Any]:
    """The figures to print; the first cycle ends with the update after the first restart."""
    last = config.train.updates
    settled = config.low_rank_start + config.relora.cycle_updates + 1
    rss = {u: mb for u, mb in watch.rss_mb.items() if u > settled}
    slope = np.polyfit(list(rss), list(rss.values()), 1)[0] if len(rss) > 1 else 0.0
    plain = {
        u: s for u, s in watch.update_s.items() if u > settled and not any(steps.due(config, u))
    }  # without restarts, which take time before their update
    after = [s for u, s in plain.items() if u in watch.save_s]
    median = statistics.median(s for u, s in plain.items() if u not in watch.save_s)
    blocked = [s for u, s in watch.save_s.items() if settled < u < last]
    return {
        "config": config.name,
        "updates": last,
        "device": str(jax.devices()[0]),
        "cores": os.cpu_count(),
        "rss_mb": {u: round(watch.rss_mb[u]) for u in range(last // 10, last + 1, last // 10)},
        "rss_mb_per_1000_updates": round(1000 * float(slope), 2),
        "first_cycle_ended_at": settled,
        "compiled_in_first_cycle": sum(n for u, n in watch.compiled.items() if u <= settled),
        "compiled_later_at": sorted(u for u in watch.compiled if settled < u < last),
        "update_ms": round(1e3 * median, 1),
        "update_after_a_save_ms": round(1e3 * statistics.median(after), 1) if after else None,
        "ratio": round(statistics.median(after) / median, 3) if after else None,
        "saves": len(after),
        "save_call_ms": round(1e3 * statistics.median(blocked), 1) if blocked else None,
    }


def resident_mb() -> float:
    """Memory of this process that is in RAM, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    cli.main(main, __doc__)
