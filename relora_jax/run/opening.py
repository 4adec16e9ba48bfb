"""Opens a run: locks and checks its directory, prepares its rows and compiles, and restores its state."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import relora_jax
from relora_jax import shapes
from relora_jax.checkpoint.restore import restore_newest
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.config import Config, flatten
from relora_jax.data.copies import copies_of, publish
from relora_jax.data.patterns import NoFilesError
from relora_jax.data.prepared import Prepared, check_rows, check_vocabulary, prepare
from relora_jax.data.stores import PrepareOptions
from relora_jax.run import directory, record, warm_start
from relora_jax.storage.location import AnyPath
from relora_jax.storage.writer import Writer
from relora_jax.training import processes
from relora_jax.training.program import Program, enable_compilation_cache
from relora_jax.training.sharding import make_mesh
from relora_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class OpenRun:
    """An open run: its directory, rows, compiled programs and state."""

    config: Config
    writer: Writer
    prepared: Prepared
    program: Program
    update: int  # updates completed
    state: TrainState  # after `update` updates; the first train step donates it
    resumed: bool  # whether the state is from a checkpoint of this run

    @property
    def workdir(self) -> AnyPath:
        """The run's directory."""
        return self.writer.folder


@contextlib.contextmanager
def open_run(config: Config, workdir: AnyPath, options: PrepareOptions) -> Iterator[OpenRun | None]:
    """Yields the run of a valid config in `workdir`, locked inside the `with`; None if it is finished.

    Missing rows are prepared with `options`. UserError, before anything is computed or written, if the
    directory, rows or warm start do not fit this run, or if one of several processes has others.
    """
    writer = Writer(workdir, active=processes.is_writer())
    if processes.together(lambda: _is_finished(workdir, config)):
        updates = config.train.updates
        writer.print(f"{workdir} is finished, {updates} updates done: {record.summary(workdir)}")
        yield None
        return
    with contextlib.ExitStack() as stack:
        processes.together(lambda: stack.enter_context(directory.locked(writer, config)))
        pid = processes.from_writer(os.getpid())
        processes.together(lambda: directory.check_is_shared(workdir, pid))
        saved = updates_saved(workdir)
        has_source = config.train.init_from and not saved
        source = processes.together(lambda: warm_start.find(config)) if has_source else None
        prepared = processes.together(
            lambda: _prepare(config, writer, options, has_checkpoint=bool(saved), source=bool(source))
        )
        processes.agree(_facts(config, directory.keys_of(prepared), saved))
        enable_compilation_cache()
        writer.print(_describe(config))
        program = Program(config, make_mesh(**vars(config.mesh), devices=jax.devices()))
        if restored := restore_newest(writer, config, program.state_at):
            u, state = restored[0], program.placed(restored[1])
        elif source:
            writer.print(f"starts at update {source.update} from {source.path}")
            u, state = source.update, warm_start.load(source, program)
        else:
            u, state = 0, program.init()
        yield OpenRun(config, writer, prepared, program, u, state, resumed=restored is not None)


def _is_finished(workdir: AnyPath, config: Config) -> bool:
    """Whether this run has ended and been reported. UserError if another run has."""
    finished = config.train.updates in updates_saved(workdir) and (workdir / record.REPORT).is_file()
    if finished:
        directory.check(workdir, config)
    return finished


def _facts(config: Config, rows: dict[str, Any], saved: list[int]) -> dict[str, Any]:
    """Whatever all processes must have in common."""
    code = hashlib.sha256()
    package = Path(relora_jax.__file__).parent
    for file in sorted(package.rglob("*.py")):
        code.update(file.read_bytes())
    settings = {key: str(value) for key, value, _ in flatten(config)}
    versions = {name: version(name) for name in directory.PACKAGES}
    return {**settings, "rows": rows, "checkpoints": saved, "code": code.hexdigest()[:12], **versions}


def _prepare(
    config: Config, writer: Writer, options: PrepareOptions, *, has_checkpoint: bool, source: bool
) -> Prepared:
    """The run's tokenizer and rows, checked against the config and against earlier starts of the run."""
    workdir = writer.folder
    copies = copies_of(workdir)
    try:
        prepared = prepare(config.data, options._replace(copies=copies))
    except NoFilesError as error:
        if not has_checkpoint:
            raise
        raise OSError(f"the text of {workdir} is missing: {error}") from error  # a mount may be late
    check_vocabulary(config, prepared.tokenizer)
    check_rows(config, prepared.train)
    directory.check_rows(workdir, directory.keys_of(prepared))
    if copies and writer.active:
        publish((prepared.train, prepared.validation), copies)
    if source:
        warm_start.check_tokenizer(config, directory.keys_of(prepared))
    return prepared


def _describe(config: Config) -> str:
    """One line with the numbers of trained and frozen parameters and the reduction."""
    count, warm = shapes.count(config), config.relora.warm_start_updates
    after = f" after {warm} full-rank updates" if count.frozen and warm else ""
    return (
        f"{config.name}, arm {config.arm}: trains {count.trained:,} parameters and freezes {count.frozen:,}"
        f"{after}; full-rank model {count.full_rank_total:,}, reduction {count.reduction_percent:.1f}%"
    )
