"""One run, top to bottom: open it, then for each update restart if due, train, log, evaluate and save."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from relora_jax import shapes
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.config import Config, to_json
from relora_jax.data import batches
from relora_jax.data.batches import Batch
from relora_jax.data.stores import PrepareOptions
from relora_jax.errors import DIVERGED, STOPPED
from relora_jax.planning import chips
from relora_jax.run import directory, profile, record, wandb_sink
from relora_jax.run.goodput import Clock
from relora_jax.run.metrics import Diverged, Metrics, Sink
from relora_jax.run.opening import OpenRun, open_run
from relora_jax.run.profile import Profile
from relora_jax.run.restarts import QuietFactors, Restarts
from relora_jax.run.signals import Signals
from relora_jax.run.stall import Stalls
from relora_jax.run.tensorboard_sink import Board
from relora_jax.storage.location import AnyPath
from relora_jax.storage.writer import Writer
from relora_jax.training import processes, steps
from relora_jax.training.eval_prompts import EvalPrompts
from relora_jax.training.evaluation import evaluate, unigram_perplexity
from relora_jax.training.program import Program
from relora_jax.training.sharding import start_devices
from relora_jax.training.state import TrainState
from relora_jax.validate import validate


def run(config: Config, workdir: AnyPath, options: PrepareOptions, signals: Signals) -> int:
    """Opens the run, trains it to its end or to a signal, and reports; returns the exit code."""
    clock = Clock()
    validate(config, devices=len(start_devices()))
    wandb_sink.check(config.train.wandb)
    profile.parse(config.train.profile, updates=config.train.updates)
    with open_run(config, workdir, options) as opened:
        if opened is None:
            return 0
        writer = opened.writer
        try:
            stopped_at = train(opened, signals, clock)
        except Diverged as error:
            writer.print(f"error: {error}", warning=True)
            return DIVERGED
        if stopped_at is not None:
            writer.print(f"stopped and saved after update {stopped_at}: run the same command again to resume")
            return STOPPED
        processes.together(lambda: _report(writer))  # the others wait: a report may take minutes
        return 0


def _report(writer: Writer) -> None:
    if writer.active:
        from relora_jax.reporting import page  # draws with matplotlib: only now, since it takes half a second

        page.write(writer.folder)
        writer.print(record.summary(writer.folder))


def train(run: OpenRun, signals: Signals, clock: Clock) -> int | None:
    """Trains to the end (None) or to a signal (the number of updates completed and saved)."""
    config, program, updates = run.config, run.program, run.config.train.updates
    validation = list(
        batches.validation_batches(
            run.prepared.validation,
            eval_tokens=config.train.eval_tokens,
            microbatch=config.train.microbatch,
            sharding=program.eval_rows,
            across_documents=config.data.attend_across_documents,
        )
    )
    unigram = unigram_perplexity(run.prepared.train.counts, validation)
    facts = {"unigram_perplexity": unigram, **directory.special(run.workdir, config)}
    directory.begin(run.writer, config, rows=directory.keys_of(run.prepared), **facts)
    prompts = EvalPrompts(run.prepared.validation, run.prepared.tokenizer)
    stream = batches.prefetch(batches.stream(config, run.prepared.train, program.rows), run.update, updates)
    start = {"restored_update": run.update, "fresh": not run.resumed}
    with (
        Stalls(run.writer, clock),
        Profile(run.writer, clock, profile.parse(config.train.profile, updates=updates)) as profiler,
        Checkpoints(run.workdir, config) as checkpoints,
        Metrics(run.writer, updates=updates, sinks=_sinks(run), clock=clock, **start) as metrics,
        closing(stream),
    ):
        signals.exit_immediately, state = False, run.state
        restarts, quiet = Restarts(config, program, run.writer, validation[0]), QuietFactors(run.writer)
        recorder = Recorder(config, program, metrics, checkpoints, validation, prompts, signals)
        if run.resumed:
            run.writer.print(f"resumed after update {run.update}")
        if recorder.record(run.update, state):
            return run.update
        for u, batch in enumerate(clock.batches(stream), run.update):
            profiler.before(u, state.update)
            if steps.due(config, u).merge:
                with metrics.pause("restart", state.update):
                    restarts.before(state)
            state, due = program.begin_update(u, state, context=partial(metrics.pause, "restart"))
            if due.merge:
                with metrics.pause("restart"):
                    fields = restarts.after(u, state, due)
                metrics.restart(u, merged=due.merge, reset=due.reset, **fields)
            learning_rate = steps.learning_rate(config, u)
            compiles = u == run.update or due.start_low_rank
            with clock.spending("compile") if compiles else nullcontext():
                state, values = program.train_step(state, batch, learning_rate)
            if compiles and config.model.remat == "auto" and program.remat_policy(state) == "full":
                run.writer.print("model.remat auto is full: an update with dots does not fit")
            quiet.update(u + 1, values.pop("without_gradient", None), state)
            clock.computing(values["loss"])
            profiler.after(u + 1, state.update)
            recorder.log(u + 1, learning_rate, values)
            if recorder.record(u + 1, state):
                return u + 1
    return None


@dataclasses.dataclass(frozen=True)
class Recorder:
    """After an update: its train row, evaluation, samples and checkpoint. Never changes the state."""

    config: Config
    program: Program
    metrics: Metrics
    checkpoints: Checkpoints
    validation: Sequence[Batch]
    prompts: EvalPrompts
    signals: Signals

    def log(self, u: int, learning_rate: float, values: dict[str, Any]) -> None:
        """Writes the train row after u updates, if due."""
        if u % self.config.train.log_every_updates == 0 or u == self.config.train.updates:
            values |= {"lr": learning_rate, "restarts": steps.restarts_done(self.config, u)}
            self.metrics.train(u, **values, **hardware(self.config, self.program.mesh, u))

    def record(self, u: int, state: TrainState) -> bool:
        """Evaluates and saves the state after u updates, if due; metrics reach the disk before a checkpoint.

        True if a signal asked to stop: the state is then saved in any case, and the next start evaluates it.
        """
        cadence, evaluated = self.config.train, self.metrics.evaluated
        due = evaluated < 0 or u % cadence.evaluate_every_updates == 0 or u == cadence.updates
        if due and u > evaluated and not self.signals.should_stop():
            with self.metrics.pause("evaluation", state.update):
                self._evaluate(u, state)
        stop = self.signals.should_stop()
        if stop or self.checkpoints.due(u):
            with self.metrics.pause("save", state.update):
                self.metrics.flush(u)
                self.checkpoints.save(u, self.program.saved(state))
        return stop

    def _evaluate(self, u: int, state: TrainState) -> None:
        """Writes the eval and sample rows, or none if a signal comes before all of them are computed."""
        result = evaluate(self.program, state, self._until_signal())
        samples = [] if self.signals.should_stop() else self.prompts.continuations(self.program, state)
        if not self.signals.should_stop():
            self.metrics.eval(u, **result._asdict())
            for prompt, text in samples:
                self.metrics.sample(u, prompt=prompt, text=text)

    def _until_signal(self) -> Iterator[Batch]:
        """The validation batches, at least one, until a signal."""
        for batch in self.validation:
            yield batch
            if self.signals.should_stop():
                return


def hardware(config: Config, mesh: Mesh, u: int) -> dict[str, Any]:
    """What the devices could do in the update before u, and have held; None if it is not known."""
    chip, memory = chips.of_device(mesh.devices.flat[0]), jax.local_devices()[0].memory_stats() or {}
    flops = shapes.matmul_flops_per_token(config, low_rank=u > config.low_rank_start)
    return {
        "peak_tokens_per_s": chip and chip.matmul_flops_per_s * mesh.size / flops,
        "peak_bytes": memory.get("peak_bytes_in_use"),
    }


def _sinks(run: OpenRun) -> list[Sink]:
    """The sinks besides metrics.jsonl."""
    if not run.writer.active:
        return []
    purge_step = run.update + 1 if run.resumed else 0
    sinks: list[Sink] = [Board(run.workdir / "tensorboard", purge_step=purge_step)]
    if project := run.config.train.wandb:
        config = json.loads(to_json(run.config))
        sinks.append(
            wandb_sink.WeightsAndBiases(run.writer, project=project, config=config, resumed=run.resumed)
        )
    return sinks
