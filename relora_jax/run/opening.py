"""Opening a run: its directory is locked, checked and restored, each once, before its first update."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax

from relora_jax import shapes
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.config import Config
from relora_jax.data.file_source import AbsentError
from relora_jax.data.prepared import Prepared, check_rows, check_vocabulary, prepare
from relora_jax.data.stores import How
from relora_jax.run import directory, record, warm_start
from relora_jax.storage.writer import Writer
from relora_jax.training.program import Program, keep_compiled
from relora_jax.training.sharding import make_mesh
from relora_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """A run that this process may continue: its directory, its rows, its compiled steps and its state."""

    config: Config
    writer: Writer
    prepared: Prepared
    program: Program
    update: int  # updates done
    state: TrainState  # after them; donated by the first update
    resumed: bool  # whether it comes from a checkpoint of this run

    @property
    def workdir(self) -> Path:
        """The run's directory."""
        return self.writer.folder


@contextlib.contextmanager
def open_run(config: Config, workdir: Path, how: How) -> Iterator[OpenRun | None]:
    """The run of a valid config in `workdir`, which is locked while inside; None where it is finished.

    Missing rows are made as `how` says. UserError for a directory, rows or a warm start that this run cannot
    have, before anything is computed or written.
    """
    writer = Writer(workdir, active=jax.process_index() == 0)
    if config.train.updates in updates_saved(workdir) and (workdir / record.REPORT).is_file():
        directory.check(workdir, config)
        done = f"{workdir} is finished, {config.train.updates} updates done"
        writer.say(f"{done}: {record.summary(workdir)}")
        yield None
        return
    with directory.locked(writer, config):
        saved = updates_saved(workdir)
        begins_with = warm_start.find(config) if config.train.init_from and not saved else None
        prepared = _prepare(config, workdir, how, began=bool(saved))
        if begins_with:
            warm_start.check_tokenizer(config, directory.keys_of(prepared))
        keep_compiled()
        writer.say(_describe(config))
        program = Program(config, make_mesh(**vars(config.mesh), devices=jax.devices()))
        if restored := restore_newest(writer, config, program.state_at):
            u, state = restored
        elif begins_with:
            writer.say(f"begins at update {begins_with.update} with {begins_with.path}")
            u, state = begins_with.update, warm_start.load(begins_with, program)
        else:
            u, state = 0, program.init()
        yield OpenRun(config, writer, prepared, program, u, state, resumed=restored is not None)


def _prepare(config: Config, workdir: Path, how: How, *, began: bool) -> Prepared:
    """The run's tokenizer and rows, which fit the config and are those that it began with."""
    try:
        prepared = prepare(config.data, how)
    except AbsentError as error:
        if not began:
            raise
        raise OSError(f"the text of {workdir} is away: {error}") from error  # a mount may be late
    check_vocabulary(config, prepared.tokenizer)
    check_rows(config, prepared.train)
    directory.check_rows(workdir, directory.keys_of(prepared))
    return prepared


def _describe(config: Config) -> str:
    """What a run is, in one line: parameters trained and frozen, and the reduction."""
    count, warm = shapes.count(config), config.relora.warm_start_updates
    after = f" after {warm} full-rank updates" if count.frozen and warm else ""
    return (
        f"{config.name}, arm {config.arm}: trains {count.trained:,} parameters and freezes {count.frozen:,}"
        f"{after}; full-rank total {count.full_rank_total:,}, reduction {count.reduction_percent:.1f}%"
    )
