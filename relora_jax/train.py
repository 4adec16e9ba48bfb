"""python -m relora_jax.train --config=configs/FILE.py[:ARM] [--config.GROUP.FIELD=VALUE ...] [--workdir=DIR]

Trains, evaluates, saves and reports. The same command again resumes; a finished run says so.
ARM: full, control, lora, lora_warm or relora (default). Exit codes: 0 finished, 2 wrong setting (starting
again will not help), 70 diverged, 75 stopped by a signal (start me again), 130 interrupted outside of
the updates.
"""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from relora_jax import data, flags, places, prepare, report, run, shapes, steps, workdir
from relora_jax.checkpoint import Checkpoints, updates_saved
from relora_jax.config import Config
from relora_jax.evaluate import evaluate
from relora_jax.metrics import Diverged, Metrics
from relora_jax.program import Program
from relora_jax.sharding import make_mesh
from relora_jax.stores import How
from relora_jax.validate import validate

DIVERGED, STOPPED = 70, 75


def main(argv: Sequence[str]) -> int:
    """Runs the command line; the exit code. ValueError, in one line, for what the user can mend."""
    config, strings = flags.parse(argv, workdir="")
    validate(config, devices=jax.device_count())
    place = Path(strings["workdir"] or f"runs/{config.name}-{config.arm}").expanduser()
    workdir.check(place, config)
    updates = config.train.updates
    if updates in updates_saved(place) and (place / "report.md").is_file():
        print(f"{place} is finished, {updates} updates done: {run.summary(place)}")
        return 0
    prepared = prepare.prepare(
        config.data, How(command=flags.command("prepare", argv), progress=sys.stderr.isatty())
    )
    check_data(config, prepared)
    workdir.check_rows(place, keys_of(prepared))
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str(places.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    print(opening(config))
    try:
        done = train(config, place, prepared)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    if done < updates:
        print(f"stopped after update {done}, which is saved: the same command goes on from there")
        return STOPPED
    report.write(place)
    print(run.summary(place))
    return 0


def train(config: Config, place: Path, prepared: prepare.Prepared) -> int:
    """Trains from the newest checkpoint, or from the seed, to the end or a signal; the updates done."""
    program = Program(config, make_mesh(**vars(config.mesh), devices=jax.devices()))
    settings, updates = config.train, config.train.updates
    rows = {"microbatch": settings.microbatch, "sharding": program.eval_rows}
    validation = data.validation_batches(prepared.validation, eval_tokens=settings.eval_tokens, **rows)
    unigram = data.unigram_perplexity(prepared.train.counts, validation)
    workdir.begin(place, config, unigram_perplexity=unigram, rows=keys_of(prepared))

    def batch_of(u: int) -> data.Batch:
        shape = {"batch": settings.batch, "microbatch": settings.microbatch}
        return data.train_batch(prepared.train, u, seed=settings.seed, sharding=program.rows, **shape)

    with Checkpoints(place, config) as checkpoints, _signals() as signals:
        start = checkpoints.latest()
        state = program.init() if start is None else checkpoints.restore(start, program.state_at(start))
        if start is not None:
            print(f"goes on after update {start}")
        with Metrics(place, updates=updates, restored_update=start or 0) as metrics:
            recorder = Recorder(config, program, metrics, checkpoints, validation)
            if start is None:
                recorder.record(0, state)
            for u, batch in enumerate(data.prefetch(batch_of, start or 0, updates), start or 0):
                state = recorder.begin(u, state)
                lr = steps.rate(config, u)
                state, values = program.train_step(state, batch, lr)
                recorder.log(u + 1, lr, values)
                recorder.record(u + 1, state, stop=bool(signals))
                if signals:
                    return u + 1
    return updates


class Recorder:
    """What surrounds an update: the restart that it begins with; its log, evaluation and checkpoint."""

    def __init__(
        self,
        config: Config,
        program: Program,
        metrics: Metrics,
        checkpoints: Checkpoints,
        validation: list[data.Batch],
    ) -> None:
        self.config, self.program, self.metrics = config, program, metrics
        self.checkpoints, self.validation = checkpoints, validation

    def begin(self, u: int, state: Any) -> Any:
        """The state after what is due before update u: the start of the low-rank phase, or a merge."""
        merged, reset = steps.due(self.config, u)
        starts = u == self.config.low_rank_start
        if not (starts or merged):
            return state
        with self.metrics.pause(state.update):
            if starts:
                return self.program.start_low_rank(state)
            self.metrics.restart(u, merged=merged, reset=reset)
            return self.program.restart(state, reset=reset)

    def log(self, u: int, lr: float, values: dict[str, Any]) -> None:
        """The train row of u updates done, where due."""
        if u % self.config.train.log_every_updates == 0 or u == self.config.train.updates:
            self.metrics.train(u, lr=lr, restarts=steps.restarts_done(self.config, u), **values)

    def record(self, u: int, state: Any, *, stop: bool = False) -> None:
        """Evaluates and saves the state after u updates, where due; rows are on the disk first."""
        settings = self.config.train
        if u % settings.evaluate_every_updates == 0 or u == settings.updates:
            with self.metrics.pause(state.update):
                self.metrics.eval(u, **evaluate(self.program, state, self.validation)._asdict())
        if stop or self.checkpoints.due(u):
            with self.metrics.pause(state.update):
                self.metrics.flush()
                self.checkpoints.save(u, state)


def check_data(config: Config, prepared: prepare.Prepared) -> None:
    """ValueError where tokenizer or rows do not fit the config."""
    pieces, rows, vocabulary = prepared.tokenizer.pieces, prepared.train.rows, config.model.vocab_size
    if pieces > vocabulary:
        raise ValueError(
            f"the tokenizer has {pieces} pieces and model.vocab_size is {vocabulary}: set it to {pieces}"
        )
    if rows < config.train.batch:
        raise ValueError(
            f"the train split has {rows} rows of data.sequence_length {config.data.sequence_length}, fewer "
            f"than one train.batch of {config.train.batch}: take more text, shorter rows or a smaller batch"
        )


def keys_of(prepared: prepare.Prepared) -> dict[str, Any]:
    """What decides the rows of each split: dataset version, tokenizer, packing, length."""
    return {"train": prepared.train.manifest["key"], "validation": prepared.validation.manifest["key"]}


def opening(config: Config) -> str:
    """What a run is, in one line: parameters trained and frozen, and the reduction."""
    count, warm = shapes.count(config), config.relora.warm_start_updates
    after = f" after {warm} full-rank updates" if count.frozen and warm else ""
    return (
        f"{config.name}, arm {config.arm}: trains {count.trained:,} parameters and freezes {count.frozen:,}"
        f"{after}; full-rank total {count.full_rank_total:,}, reduction {count.reduction_percent:.1f}%"
    )


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are added to, while inside."""
    got: list[int] = []
    names = (signal.SIGTERM, signal.SIGINT)
    before = {name: signal.signal(name, lambda number, _: got.append(number)) for name in names}
    try:
        yield got
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


if __name__ == "__main__":
    flags.main(main, __doc__)
