"""Restores a run's model from a checkpoint onto the available devices, with the run's own tokenizer.

Nothing is written into the run's directory, so that the run may continue at the same time.
"""

import dataclasses
import math
import sys
from contextlib import suppress

import jax
from jax.sharding import Mesh

from relora_jax.checkpoint.restore import restore
from relora_jax.checkpoint.saved import DamagedError, checkpoints_dir, updates_saved
from relora_jax.config import Config, DataConfig
from relora_jax.data import prepared
from relora_jax.data.copies import copies_of
from relora_jax.data.rows import RowStore
from relora_jax.data.stores import PrepareOptions
from relora_jax.errors import UserError
from relora_jax.run import directory, record
from relora_jax.storage.location import AnyPath
from relora_jax.tokenizer import tokenizer as tokenizers
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh, start_devices
from relora_jax.training.state import TrainState
from relora_jax.training.state import model_of as only_model
from relora_jax.validate import check_settings

TOKENIZER = "tokenizer"  # the folder of an imported run's tokenizer
OWN_SPLITS = ("train", "validation")  # a run's rows; other names are splits of its dataset


def settings_of(workdir: AnyPath) -> Config:
    """The config of the run in `workdir`. UserError if there is no run or its config is invalid."""
    config = record.read_config(workdir)
    try:
        check_settings(config)
    except UserError as error:
        raise UserError(f"{workdir / record.CONFIG}: {error}") from error
    return config


def config_of(workdir: AnyPath) -> Config:
    """The config of the run in `workdir`, adapted to this machine. UserError as in `settings_of`.

    Starts the devices first, so that their failure is not taken for a damaged checkpoint.
    """
    config = settings_of(workdir)
    start_devices()
    if jax.default_backend() != "gpu":  # the run may have used cuDNN
        config.model.attention = config.model.attention.replace("cudnn", "xla")
    return config


def update_of(workdir: AnyPath, update: int | None) -> int:
    """`update`, or that of the newest checkpoint if it is None. UserError if there is no such checkpoint."""
    updates = updates_saved(workdir)
    if not updates:
        raise UserError(f"the run in {str(workdir)!r} has no checkpoint yet: wait for the first one")
    if update is not None and update not in updates:
        choices = ", ".join(map(str, updates))
        raise UserError(f"{workdir} has no checkpoint at --update={update}: choose one of {choices}")
    return updates[-1] if update is None else update


def mesh_of(config: Config) -> Mesh:
    """A mesh with the run's fsdp and tensor if they divide the devices, else data parallelism only."""
    devices, fsdp, tensor = jax.devices(), config.mesh.fsdp, config.mesh.tensor
    if len(devices) % (fsdp * tensor):
        fsdp = tensor = 1
    return make_mesh(data=-1, fsdp=fsdp, tensor=tensor, devices=devices)


def model_of(workdir: AnyPath, u: int, config: Config, program: Program) -> TrainState:
    """The model after u updates, placed for the program. If it is damaged, UserError names an intact one."""

    def model(u: int) -> TrainState:
        return program.placed(restore(workdir, u, config, only_model(program.state_at(u))))

    try:
        return model(u)
    except DamagedError as error:
        check_not_deleted(workdir, u)
        others = set(updates_saved(workdir)) - {u}
        for other in sorted(others, key=lambda other: (other > u, abs(other - u))):  # older ones first
            with suppress(DamagedError):
                model(other)
                raise UserError(f"{error}: use --update={other}, which is intact") from error
        raise UserError(f"{error}, and no other checkpoint is intact: nothing to restore") from error


def check_not_deleted(workdir: AnyPath, u: int) -> None:
    """UserError if the run, still in progress, has deleted the checkpoint that was being read."""
    if not (checkpoints_dir(workdir) / str(u)).exists():
        raise UserError(f"{workdir} has deleted its checkpoint at update {u}: use a newer one")


def tokenizer_of(workdir: AnyPath, config: Config, spec: str) -> Tokenizer:
    """The tokenizer that the run was trained with; needs none of its rows.

    Looks it up by `spec` (--tokenizer) if not empty, else by the run's data.tokenizer, then in an imported
    run's directory. UserError if it is missing or another one, or if run.json does not say which it was.
    """
    facts = record.read_facts(workdir)
    rows = facts.get("rows", {}).get("train", {})
    if "imported_from" in facts and not rows:
        raise UserError(
            f"{workdir} was imported without a tokenizer that ends documents: put one next to the model in "
            f"{facts['imported_from']}, and import it again"
        )
    if "tokenizer" not in rows:
        raise UserError(
            f"{workdir / record.FACTS} does not say which tokenizer the run has: restore the file"
        )
    data = dataclasses.replace(config.data, tokenizer=spec or _own_spec(workdir, config))
    tokenizer = prepared.tokenizer_of(data, rows)
    if tokenizer.sha256 != rows["tokenizer"]:
        raise UserError(
            f"{workdir} was trained with a tokenizer other than {tokenizer.path} (sha256 {rows['tokenizer']} "
            f"-> {tokenizer.sha256}): restore it, or pass its path as --tokenizer=PATH"
        )
    return tokenizer


def rows_of(workdir: AnyPath, settings: DataConfig, tokenizer: Tokenizer, split: str) -> RowStore:
    """The rows of a split, encoded with the run's tokenizer; they are prepared if missing.

    UserError if the text is not what the run in `workdir` was trained on.
    """
    # the version that it was trained on, even if there is a newer one
    dataset = directory.dataset_of(workdir) or settings.dataset
    settings = dataclasses.replace(settings, dataset=dataset, tokenizer=str(tokenizer.path))
    copies = copies_of(workdir)
    own = prepared.prepare(settings, PrepareOptions(skip_bad_documents=True, copies=copies))  # if the run did
    directory.check_rows(workdir, directory.keys_of(own))
    if split in OWN_SPLITS:
        return own.train if split == "train" else own.validation
    # of any size: the user named it, and no other command prepares it
    options = PrepareOptions(build_limit_bytes=math.inf, progress=sys.stderr.isatty())
    return prepared.rows_of_split(settings, split, own.tokenizer, options)


def _own_spec(workdir: AnyPath, config: Config) -> str:
    """The run's data.tokenizer, or the tokenizer inside an imported run that was moved."""
    spec, imported = config.data.tokenizer, str(workdir / TOKENIZER)
    if tokenizers.is_trained(spec) or tokenizers.locate(spec):
        return spec
    if tokenizers.locate(imported):
        return imported
    raise UserError(f"{workdir}: tokenizer {spec!r} not found: pass its path as --tokenizer=PATH")
