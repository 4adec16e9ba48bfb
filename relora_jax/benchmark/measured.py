"""Columns measured on this machine: one update of each in turn, round after round, in one process.

What the machine does meanwhile, slows and heats therefore meets every column alike, and a ratio is taken of
two updates that ran one after the other.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from relora_jax.benchmark.column import Column
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.data.batches import Batch
from relora_jax.planning import chips
from relora_jax.training.program import Program
from relora_jax.training.remat import used_bytes
from relora_jax.training.sharding import make_mesh

LEARNING_RATE = 1e-4
RESTARTS = 3  # timed, after one that compiles


class Ours:
    """The programs of a config, as a run has them (training/program.py)."""

    def __init__(self, name: str, config: Config) -> None:
        self.name, self.config = name, config
        self._low_rank = config.arm in LOW_RANK_ARMS
        self._program = Program(config, make_mesh(**vars(config.mesh), devices=jax.devices()))
        self._batch = synthetic_batch(config, self._program)
        self._state: Any = None
        update = "low_rank_update" if self._low_rank else "full_rank_update"
        self.compiled_bytes = used_bytes(self._program.lower(update).compile())
        self.peak_bytes: float | None = None

    def start(self) -> None:
        """Allocates the state, and runs two updates."""
        program = self._program
        like = program.low_rank_on_devices if self._low_rank else program.full_rank_on_devices

        def init() -> Any:  # one program, which never holds the moments of frozen kernels
            return program.start_low_rank(program.init()) if self._low_rank else program.init()

        self._state = jax.jit(init, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, like))()
        for _ in range(2):
            self.step()

    def stop(self) -> None:
        """Frees the state."""
        self._state = None

    def step(self) -> float:
        """Seconds of one update."""
        start = time.perf_counter()
        self._state, values = self._program.train_step(self._state, self._batch, LEARNING_RATE)
        jax.block_until_ready((self._state, values))
        return time.perf_counter() - start

    def restart_s(self) -> float | None:
        """The median seconds of a restart that resets the optimizer; None if the arm has none."""
        if self.config.arm != "relora":
            return None
        times = []
        for _ in range(1 + RESTARTS):
            start = time.perf_counter()
            self._state = self._program.restart(self._state, reset=True)
            jax.block_until_ready(self._state)
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    def column(self, step_s: tuple[float, ...]) -> Column:
        """The column with these times; now the restarts are timed."""
        chip, devices = chips.of_device(jax.devices()[0]), len(jax.devices())
        peak = chip and chip.matmul_flops_per_s * devices
        return Column(
            self.name,
            self.config,
            peak,
            step_s,
            restart_s=self.restart_s(),
            compiled_bytes=self.compiled_bytes,
            peak_bytes=self.peak_bytes,
        )


def measure_peaks(runners: Sequence[Any]) -> None:
    """Sets `peak_bytes` of each to what a device says that it has held, where it says so.

    A device's peak never falls: the smallest programs come first, and one that does not raise it has none.
    """
    before = _peak_bytes()
    for runner in sorted(runners, key=lambda runner: runner.compiled_bytes) if before is not None else []:
        runner.start()
        runner.stop()
        after = _peak_bytes()
        runner.peak_bytes = after if after != before else None
        before = after


def alternate(runners: Sequence[Any], *, rounds: int) -> list[Column]:
    """The column of each runner (`Ours`, or what has its start, step and column): one update a round."""
    for runner in runners:
        runner.start()
    times = [[runner.step() for runner in runners] for _ in range(rounds)]
    return [runner.column(step_s) for runner, step_s in zip(runners, zip(*times, strict=True), strict=True)]


def _peak_bytes() -> float | None:
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def synthetic_ids(*, vocab_size: int, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length + 1], uniform and always the same, for PyTorch too."""
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1)).astype(np.int32)


def synthetic_batch(config: Config, program: Program) -> Batch:
    """Synthetic rows; two documents in each, if they are apart."""
    train, length = config.train, config.data.sequence_length
    shape = (config.accumulation, train.microbatch, length + 1)
    ids = synthetic_ids(vocab_size=config.model.vocab_size, rows=train.batch, length=length).reshape(shape)
    lengths = np.full(shape[:-1], length + 1, np.int32)
    documents = np.broadcast_to(np.arange(length + 1, dtype=np.int32) // (length // 2 + 1), shape)
    parts = (ids, lengths) if config.data.attend_across_documents else (ids, lengths, documents)
    return Batch(*(jax.device_put(part, program.rows) for part in parts))
