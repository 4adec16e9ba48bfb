"""python -m relora_jax.train --config=configs/FILE.py[:ARM] [--config.GROUP.FIELD=VALUE ...] [--workdir=DIR]

Trains, evaluates, saves and reports. The same command again resumes; a finished run says so.
ARM: full, control, lora, lora_warm or relora (default). Exit codes: 0 finished, 2 wrong setting (starting
again will not help), 70 diverged, 75 stopped by a signal (start me again).
"""

import json
import os
import pathlib
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import jax

from relora_jax import data, flags, places, prepare, report, shapes, steps
from relora_jax.checkpoint import Checkpoints
from relora_jax.config import Config, changed_results, from_json, to_json
from relora_jax.evaluate import evaluate
from relora_jax.metrics import Diverged, Metrics, read, tokens_per_s
from relora_jax.program import Program
from relora_jax.sharding import make_mesh
from relora_jax.validate import validate

DIVERGED, STOPPED = 70, 75
BUILD_LIMIT_BYTES = 100_000_000  # larger datasets are prepared by their own command


def main(argv: Sequence[str]) -> int:
    """Runs the command line; the exit code. ValueError, in one line, for what the user can mend."""
    config, strings = flags.parse(argv, workdir="")
    validate(config, devices=jax.device_count())
    workdir = pathlib.Path(strings["workdir"] or f"runs/{config.name}-{config.arm}")
    check_workdir(workdir, config)
    jax.config.update("jax_compilation_cache_dir", str(places.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with Checkpoints(workdir, config) as checkpoints:
        if checkpoints.latest() == config.train.updates:
            print(f"{workdir} is finished: {config.train.updates} updates done; {summary(workdir)}")
            return 0
        prepared = prepare.prepare(config.data, build_limit_bytes=BUILD_LIMIT_BYTES)
        check_data(config, prepared)
        try:
            stopped_at = train(config, workdir, prepared, checkpoints)
        except Diverged as error:
            print(f"error: {error}")
            return DIVERGED
    if stopped_at < config.train.updates:
        print(f"stopped after update {stopped_at}, saved; the same command goes on from there")
        return STOPPED
    report.write(workdir)
    print(summary(workdir))
    return 0


def train(config: Config, workdir: pathlib.Path, prepared: prepare.Prepared, checkpoints: Checkpoints) -> int:
    """Trains from the newest checkpoint, or from the seed, to the end; the updates done."""
    mesh = make_mesh(**vars(config.mesh), devices=jax.devices())
    program = Program(config, mesh)
    options = {"microbatch": config.train.microbatch, "sharding": program.eval_rows}
    validation = data.validation_batches(prepared.validation, eval_tokens=config.train.eval_tokens, **options)
    write_facts(config, workdir, data.unigram_perplexity(prepared.train.counts, validation))
    print(opening(config))
    start = checkpoints.latest() or 0
    if start:
        print(f"resuming {workdir} at update {start}")
    with (
        Metrics(workdir, updates=config.train.updates, restored_update=start) as metrics,
        _signals() as signals,
    ):
        state = checkpoints.restore(start, program.state_at(start)) if start else program.init()
        if not start:
            record(0, config, program, state, metrics, checkpoints, validation)

        def make(u: int) -> data.Batch:
            train = config.train
            shape = {"batch": train.batch, "microbatch": train.microbatch}
            return data.train_batch(prepared.train, u, seed=train.seed, sharding=program.rows, **shape)

        for u, batch in enumerate(data.prefetch(make, start, config.train.updates), start):
            state = begin(u, config, program, state, metrics)
            lr = steps.rate(config, u)
            state, values = program.train_step(state, batch, lr)
            if (u + 1) % config.train.log_every_updates == 0:
                metrics.train(u + 1, lr=lr, restarts=restarts_done(config, u + 1), **values)
            record(u + 1, config, program, state, metrics, checkpoints, validation)
            if signals:
                metrics.flush()
                checkpoints.save(u + 1, state)
                checkpoints.wait()
                return u + 1
        metrics.flush()
        checkpoints.wait()
    return config.train.updates


def begin(u: int, config: Config, program: Program, state: Any, metrics: Metrics) -> Any:
    """The state after what is due before update u: the start of the low-rank phase, or a merge (and reset)."""
    merged, reset = steps.due(config, u)
    if u == config.low_rank_start:
        with metrics.pause(state.update):
            return program.start_low_rank(state)
    if merged:
        with metrics.pause(state.update):
            metrics.restart(u, merged=merged, reset=reset)
            return program.restart(state, reset=reset)
    return state


def record(
    u: int,
    config: Config,
    program: Program,
    state: Any,
    metrics: Metrics,
    checkpoints: Checkpoints,
    validation: list[data.Batch],
) -> None:
    """Evaluates and saves the state after u updates, where due; rows reach the disk before a checkpoint does."""
    if u % config.train.evaluate_every_updates == 0 or u == config.train.updates:
        with metrics.pause(state.update):
            metrics.eval(u, **evaluate(program, state, validation)._asdict())
    if checkpoints.due(u):
        with metrics.pause(state.update):
            metrics.flush()
            checkpoints.save(u, state)


def restarts_done(config: Config, u: int) -> int:
    """Resets among the first u updates."""
    s = u - 1 - config.low_rank_start
    return max(s, 0) // config.relora.cycle_updates if config.arm == "relora" else 0


def check_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Makes the workdir and writes config.json. ValueError where it cannot be, or holds something else."""
    saved = workdir / "config.json"
    if saved.is_file():
        changed = changed_results(from_json(saved.read_text()), config)
        if changed:
            raise ValueError(
                f"{workdir} holds a run of another config ({'; '.join(changed)}): set it back, or take another --workdir"
            )
    elif workdir.is_dir() and any(workdir.iterdir()):
        raise ValueError(
            f"workdir {str(workdir)!r} holds something else than a run: take an empty or a new one"
        )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write(saved, to_json(config))
    except OSError as error:
        reason = f"{type(error).__name__}: {error.strerror}"
        raise ValueError(
            f"workdir {str(workdir)!r} cannot be written ({reason}): take another --workdir"
        ) from None


def check_data(config: Config, prepared: prepare.Prepared) -> None:
    """ValueError where tokenizer or rows do not fit the config."""
    pieces, rows = prepared.tokenizer.pieces, prepared.train.rows
    if pieces > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {pieces} pieces and model.vocab_size is {config.model.vocab_size}: set it to {pieces} or more"
        )
    if rows < config.train.batch:
        raise ValueError(
            f"the train split has {rows} rows of {config.data.sequence_length} tokens, fewer than one train.batch of "
            f"{config.train.batch}: use more text, a shorter data.sequence_length or a smaller batch"
        )


def opening(config: Config) -> str:
    """What a run is, in one line: parameters trained and frozen, and the reduction."""
    count = shapes.count(config)
    warm = config.relora.warm_start_updates
    after = f" after {warm} full-rank updates" if count.frozen and warm else ""
    return (
        f"{config.name}, arm {config.arm}: trains {count.trained:,} parameters and freezes {count.frozen:,}{after}; "
        f"full-rank {count.full_rank_total:,}, reduction {count.reduction_percent:.1f}%"
    )


def write_facts(config: Config, workdir: pathlib.Path, unigram_perplexity: float) -> None:
    """run.json: what this start of the run is made of."""
    count = shapes.count(config)
    names = ("jax", "flax", "optax", "orbax-checkpoint")
    facts = {
        "trained": count.trained,
        "frozen": count.frozen,
        "full_rank_total": count.full_rank_total,
        "reduction_percent": count.reduction_percent,
        "unigram_perplexity": unigram_perplexity,
        "versions": {name: version(name) for name in names},
        "devices": [str(device) for device in jax.devices()],
    }
    _write(workdir / "run.json", json.dumps(facts, indent=2) + "\n")


def summary(workdir: pathlib.Path) -> str:
    """Perplexity before and after, the unigram's, tokens/s, and where the report is."""
    rows = read(workdir)
    found = [row["perplexity"] for row in rows if row["kind"] == "eval"]
    unigram = json.loads((workdir / "run.json").read_text())["unigram_perplexity"]
    speed = tokens_per_s(rows)
    report_path = workdir / "report.md"
    return (
        f"perplexity {found[0]:,.1f} -> {found[-1]:,.1f} (unigram distribution {unigram:,.1f}), "
        f"{speed or 0:,.0f} tokens/s, report: {report_path}"
    )


def _write(path: pathlib.Path, text: str) -> None:
    """The whole text or the file as it was, also after a kill."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are added to, while inside."""
    got: list[int] = []
    before = {
        name: signal.signal(name, lambda number, _: got.append(number))
        for name in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield got
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


if __name__ == "__main__":
    flags.main(main, __doc__)
