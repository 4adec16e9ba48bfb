"""A run's model at one of its checkpoints, on the devices that are here, and the run's own tokenizer.

Nothing is written into the run's directory: it may go on meanwhile.
"""

import dataclasses
import math
import sys
from contextlib import suppress
from pathlib import Path

import jax
from jax.sharding import Mesh

from relora_jax.checkpoint.restore import restore
from relora_jax.checkpoint.saved import DamagedError, checkpoints_dir, updates_saved
from relora_jax.config import Config, DataConfig
from relora_jax.data import prepared
from relora_jax.data.rows import RowStore
from relora_jax.data.stores import How
from relora_jax.errors import UserError
from relora_jax.run import directory, record
from relora_jax.tokenizer import tokenizer as tokenizers
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh, start_devices
from relora_jax.training.state import TrainState
from relora_jax.training.state import model_of as only_model
from relora_jax.validate import check_settings

TOKENIZER = "tokenizer"  # of an imported run: its own
OWN_SPLITS = ("train", "validation")  # of a run; others are splits of its dataset


def settings_of(place: Path) -> Config:
    """The config of the run in `place`. UserError where there is no run, or none that could be trained."""
    config = record.read_config(place)
    try:
        check_settings(config)
    except UserError as error:
        raise UserError(f"{place / record.CONFIG}: {error}") from error
    return config


def config_of(place: Path) -> Config:
    """The config of the run in `place`, as it can be computed here. UserError as `settings_of`.

    The devices are started first: what a checkpoint is read on must not be taken for its damage.
    """
    config = settings_of(place)
    start_devices()
    if jax.default_backend() != "gpu":  # where the run was, cuDNN may have been
        config.model.attention = config.model.attention.replace("cudnn", "xla")
    return config


def update_of(place: Path, asked: int | None) -> int:
    """`asked`, or the update of the newest checkpoint. UserError where there is none."""
    there = updates_saved(place)
    if not there:
        raise UserError(f"the run in {str(place)!r} has no checkpoint yet: wait for its first")
    if asked is not None and asked not in there:
        listed = ", ".join(map(str, there))
        raise UserError(f"{place} has no checkpoint of --update={asked}: there are {listed}")
    return there[-1] if asked is None else asked


def mesh_of(config: Config) -> Mesh:
    """The run's fsdp where it fits the devices that are here, else data alone."""
    devices, fsdp = jax.devices(), config.mesh.fsdp
    return make_mesh(data=-1, fsdp=fsdp if len(devices) % fsdp == 0 else 1, tensor=1, devices=devices)


def model_of(place: Path, u: int, config: Config, program: Program) -> TrainState:
    """The model after u updates, placed for the program. UserError names another that is whole."""

    def model(u: int) -> TrainState:
        return restore(place, u, config, only_model(program.state_at(u)))

    try:
        return model(u)
    except DamagedError as error:
        check_kept(place, u)
        others = set(updates_saved(place)) - {u}
        for other in sorted(others, key=lambda other: (other > u, abs(other - u))):  # an older one first
            with suppress(DamagedError):
                model(other)
                raise UserError(f"{error}: --update={other} is whole, take that one") from error
        raise UserError(f"{error}, and no other is whole: nothing to restore here") from error


def check_kept(place: Path, u: int) -> None:
    """UserError where the run, which goes on, has deleted the checkpoint that was being read."""
    if not (checkpoints_dir(place) / str(u)).exists():
        raise UserError(f"{place} deleted its checkpoint of {u} meanwhile: take a newer one")


def tokenizer_of(place: Path, config: Config, lies_at: str) -> Tokenizer:
    """The tokenizer that the run was trained with; of the rows nothing is needed.

    It is looked for at `lies_at`, as --tokenizer has it, and where that is empty as the run named it, then
    in an imported run itself. UserError where it is not there, another lies in its place, or run.json does
    not tell which it was.
    """
    facts = record.read_facts(place)
    rows = facts.get("rows", {}).get("train", {})
    if "imported_from" in facts and not rows:
        raise UserError(
            f"{place} was imported without a tokenizer that ends documents: put one beside the model in "
            f"{facts['imported_from']}, and import it again"
        )
    if "tokenizer" not in rows:
        raise UserError(f"{place / record.FACTS} does not say which tokenizer the run has: bring it back")
    name = lies_at or _name_of(place, config)
    found = prepared.tokenizer_of(dataclasses.replace(config.data, tokenizer=name), rows)
    if found.sha256 != rows["tokenizer"]:
        raise UserError(
            f"{place} was trained with another tokenizer than {found.path} (sha256 {rows['tokenizer']} -> "
            f"{found.sha256}): bring it back, or say where it lies by --tokenizer=PATH"
        )
    return found


def rows_of(place: Path, settings: DataConfig, tokenizer: Tokenizer, split: str) -> RowStore:
    """The rows of a split, with the tokenizer that the run was trained with, found or made.

    UserError where they are not those that the run in `place` was trained on.
    """
    # the version that it was trained on, whatever is newer now
    dataset = directory.dataset_of(place) or settings.dataset
    settings = dataclasses.replace(settings, dataset=dataset, tokenizer=str(tokenizer.path))
    own = prepared.prepare(settings)
    directory.check_rows(place, directory.keys_of(own))
    if split in OWN_SPLITS:
        return own.train if split == "train" else own.validation
    # however large: it was asked for by name, and no other command makes it
    how = How(build_limit_bytes=math.inf, progress=sys.stderr.isatty())
    return prepared.rows_of_split(settings, split, own.tokenizer, how)


def _name_of(place: Path, config: Config) -> str:
    """The run's data.tokenizer, or that of an imported run which lies elsewhere now."""
    name, own = config.data.tokenizer, str(place / TOKENIZER)
    if tokenizers.is_trained(name) or tokenizers.locate(name):
        return name
    if tokenizers.locate(own):
        return own
    raise UserError(
        f"{place} has its tokenizer at {name!r}, and none is there: say where by --tokenizer=PATH"
    )
