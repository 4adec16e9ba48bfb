"""python -m relora_jax.train --config=configs/FILE.py[:ARM] [--config.GROUP.FIELD=VALUE ...] [--workdir=DIR]

Trains, evaluates, saves and reports. The same command again resumes; a finished run says so.
ARM: full, control, lora, lora_warm or relora (default). Exit codes: 0 finished, 2 wrong setting (starting
again will not help), 70 diverged, 74 data or disk failed, 75 stopped by a signal (start me again).
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from relora_jax import data, flags, prepare, report, run, shapes, steps, warm_start, workdir
from relora_jax import weights_and_biases as wandb
from relora_jax.checkpoint import Checkpoints, restore_newest, updates_saved
from relora_jax.config import Config, to_json
from relora_jax.evaluate import evaluate
from relora_jax.files import AbsentError
from relora_jax.metrics import Diverged, Metrics, Sink
from relora_jax.openings import Openings
from relora_jax.program import Program, keep_compiled
from relora_jax.sharding import make_mesh, start_devices
from relora_jax.signals import STOPPED, Signals
from relora_jax.stores import How
from relora_jax.tensorboard import Board
from relora_jax.validate import validate

DIVERGED = 70


def main(argv: Sequence[str]) -> int:
    """Runs the command line; the exit code. ValueError, in one line, for what the user can mend."""
    config, strings = flags.parse(argv, workdir="")
    place = Path(strings["workdir"] or f"runs/{config.name}-{config.arm}").expanduser()
    with Signals() as signals:
        validate(config, devices=len(start_devices()))
        wandb.check(config.train.wandb)
        workdir.check(place, config)
        saved = updates_saved(place)
        if config.train.updates in saved and (place / "report.md").is_file():
            print(f"{place} is finished, {config.train.updates} updates done: {run.summary(place)}")
            return 0
        if config.train.init_from and not saved:
            warm_start.find(config)
        how = How(command=flags.command("prepare", argv), progress=sys.stderr.isatty())
        try:
            prepared = prepare.prepare(config.data, how)
        except AbsentError as error:
            if not saved:
                raise
            raise OSError(f"the text of {place} is away: {error}") from error  # a mount may be late
        check_data(config, prepared)
        workdir.check_rows(place, workdir.keys_of(prepared))
        if config.train.init_from and not saved:
            warm_start.check_tokenizer(config, workdir.keys_of(prepared))
        with workdir.locked(place):
            workdir.check(place, config)  # again: another process may have begun there meanwhile
            return run_to_end(config, place, prepared, signals)


def run_to_end(config: Config, place: Path, prepared: prepare.Prepared, signals: Signals) -> int:
    """Trains and reports; the exit code."""
    keep_compiled()
    print(opening(config))
    try:
        stopped_at = train(config, place, prepared, signals)
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED
    if stopped_at is not None:
        print(f"stopped after update {stopped_at}, which is saved: the same command goes on from there")
        return STOPPED
    report.write(place)
    print(run.summary(place))
    return 0


def train(config: Config, place: Path, prepared: prepare.Prepared, signals: Signals) -> int | None:
    """Trains from the newest checkpoint or what `begin` gives, to the end or a signal.

    Returns the updates done, and saved, where a signal stopped it; None at the end.
    """
    program = Program(config, make_mesh(**vars(config.mesh), devices=jax.devices()))
    settings, updates = config.train, config.train.updates
    validation = list(
        data.validation_batches(
            prepared.validation,
            eval_tokens=settings.eval_tokens,
            microbatch=settings.microbatch,
            sharding=program.eval_rows,
            across_documents=config.data.attend_across_documents,
        )
    )
    unigram = data.unigram_perplexity(prepared.train.counts, validation)
    restored = restore_newest(place, config, program.state_at)
    start, state = restored or begin(config, program)
    facts = {"unigram_perplexity": unigram, **workdir.special(place, config)}
    workdir.begin(place, config, rows=workdir.keys_of(prepared), **facts)

    batch_of = data.stream(config, prepared.train, program.rows)
    told = {"restored_update": start, "anew": restored is None}
    with (
        Checkpoints(place, config) as checkpoints,
        Metrics(place, updates=updates, sinks=sinks_of(config, place, **told), **told) as metrics,
    ):
        signals.at_once = False
        openings = Openings(prepared.validation, prepared.tokenizer)
        recorder = Recorder(config, program, metrics, checkpoints, validation, openings, signals)
        if restored is not None:
            print(f"goes on after update {start}")
        if recorder.record(start, state):
            return start
        for u, batch in enumerate(data.prefetch(batch_of, start, updates), start):
            state = recorder.begin(u, state)
            lr = steps.rate(config, u)
            state, values = program.train_step(state, batch, lr)
            recorder.log(u + 1, lr, values)
            if recorder.record(u + 1, state):
                return u + 1
    return None


def begin(config: Config, program: Program) -> tuple[int, Any]:
    """(u, state) that a run without a checkpoint begins with: the seed's, or train.init_from's at u = W."""
    if not config.train.init_from:
        return 0, program.init()
    found = warm_start.find(config)
    print(f"begins at update {found.update} with {found.path}")
    return found.update, warm_start.load(found, program)


class Recorder:
    """What surrounds an update: the restart that it begins with; its log, evaluation, samples, checkpoint."""

    def __init__(
        self,
        config: Config,
        program: Program,
        metrics: Metrics,
        checkpoints: Checkpoints,
        validation: list[data.Batch],
        openings: Openings,
        signals: Signals,
    ) -> None:
        self.config, self.program, self.metrics, self.signals = config, program, metrics, signals
        self.checkpoints, self.validation, self.openings = checkpoints, validation, openings

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

    def record(self, u: int, state: Any) -> bool:
        """Evaluates and saves the state after u updates, where due; rows are on the disk first.

        True where a signal asked to stop: then it is saved in any case, and the next start evaluates it.
        """
        settings, evaluated = self.config.train, self.metrics.evaluated
        due = evaluated < 0 or u % settings.evaluate_every_updates == 0 or u == settings.updates
        if due and u > evaluated and not self.signals.asked:
            with self.metrics.pause(state.update):
                self._evaluate(u, state)
        stop = self.signals.asked
        if stop or self.checkpoints.due(u):
            with self.metrics.pause(state.update):
                self.metrics.flush()
                self.checkpoints.save(u, state, low_priority=not stop and u < settings.updates)
        return stop

    def _evaluate(self, u: int, state: Any) -> None:
        """The rows of eval and sample; none where a signal came before all of them were there."""
        found = evaluate(self.program, state, self._until_asked())
        continued = [] if self.signals.asked else self.openings.continued(self.program, state)
        if not self.signals.asked:
            self.metrics.eval(u, **found._asdict())
            for prompt, text in continued:
                self.metrics.sample(u, prompt=prompt, text=text)

    def _until_asked(self) -> Iterator[data.Batch]:
        """The batches of the evaluation; at least one."""
        for batch in self.validation:
            yield batch
            if self.signals.asked:
                return


def sinks_of(config: Config, place: Path, *, restored_update: int, anew: bool) -> list[Sink]:
    """Where rows go besides metrics.jsonl."""
    sinks: list[Sink] = [Board(place / "tensorboard", purge_step=0 if anew else restored_update + 1)]
    if config.train.wandb and jax.process_index() == 0:
        told = json.loads(to_json(config))
        sinks.append(wandb.WeightsAndBiases(place, project=config.train.wandb, config=told, resumed=not anew))
    return sinks


def check_data(config: Config, prepared: prepare.Prepared) -> None:
    """ValueError where tokenizer or rows do not fit the config."""
    prepare.check_vocabulary(config, prepared.tokenizer)
    rows = prepared.train.rows
    if rows < config.train.batch:
        raise ValueError(
            f"the train split has {rows} rows of data.sequence_length {config.data.sequence_length}, fewer "
            f"than one train.batch of {config.train.batch}: take more text, shorter rows or a smaller batch"
        )


def opening(config: Config) -> str:
    """What a run is, in one line: parameters trained and frozen, and the reduction."""
    count, warm = shapes.count(config), config.relora.warm_start_updates
    after = f" after {warm} full-rank updates" if count.frozen and warm else ""
    return (
        f"{config.name}, arm {config.arm}: trains {count.trained:,} parameters and freezes {count.frozen:,}"
        f"{after}; full-rank total {count.full_rank_total:,}, reduction {count.reduction_percent:.1f}%"
    )


if __name__ == "__main__":
    flags.main(main, __doc__)
