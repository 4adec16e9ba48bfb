"""A run's directory before and at its start: whose it is, may this run use it, what is the run made of."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from relora_jax import shapes
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.config import Config, changed_results, to_json
from relora_jax.data.prepared import Prepared, dataset_version
from relora_jax.errors import UserError
from relora_jax.run.record import CONFIG, FACTS, LOCK, read_config, read_facts
from relora_jax.storage import lock
from relora_jax.storage.writer import Writer

LEFT = (".new", ".tmp")  # of files that a kill left half written, by this version and earlier ones
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


@contextlib.contextmanager
def locked(writer: Writer, config: Config) -> Iterator[None]:
    """The directory is there for the run of `config`, and no other process writes it meanwhile.

    UserError where it holds something else, another run, or another process is inside. What was made here is
    removed again where an error ends the `with` before a run was written.
    """
    workdir = writer.folder
    _check_free(workdir)
    if not writer.active:
        check(workdir, config)
        yield
        return

    def refuse(process: str) -> None:
        raise UserError(
            f"{workdir} is in use by process {process}: wait for its end, or take another --workdir"
        )

    file = workdir / LOCK
    made = [path for path in (workdir, *workdir.absolute().parents) if not path.exists()]
    is_new = not file.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise UserError(
            f"workdir {str(workdir)!r} cannot be written ({error.strerror}): take another --workdir"
        ) from None
    with lock.locked(file, busy=refuse) as sign:
        try:
            check(workdir, config)
            sign()
            writer.clear()
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                if is_new:
                    file.unlink()
                for path in made:
                    path.rmdir()  # where nothing was written
            raise


def _check_free(workdir: Path) -> None:
    """UserError where the directory is neither new nor a run's."""
    if workdir.is_symlink() and not workdir.exists():
        raise UserError(f"workdir {str(workdir)!r} is a link to nowhere: take another --workdir")
    if (workdir / CONFIG).is_file():
        read_config(workdir)
        return
    held = [path for path in workdir.iterdir() if path.name != LOCK] if workdir.is_dir() else []
    if any(path.suffix not in LEFT for path in held):
        raise UserError(f"workdir {str(workdir)!r} holds something else than a run: take a new one")


def check(workdir: Path, config: Config) -> None:
    """UserError where the directory holds another run, or this one on another version of its dataset.

    A run without a checkpoint has nothing to lose: another config may begin anew in its place.
    """
    if not (workdir / CONFIG).is_file():
        return
    changed = changed_results(read_config(workdir), config)
    if changed and updates_saved(workdir):
        raise UserError(
            f"{workdir} holds a run of another config, which would change its result "
            f"({'; '.join(changed)}): set it back, or take another --workdir"
        )
    _check_dataset(workdir, config)


def _check_dataset(workdir: Path, config: Config) -> None:
    """UserError where data.dataset names another version than that of the run, as where a newer one came.

    A run that has done its updates reads no more.
    """
    saved = updates_saved(workdir)
    if not saved or config.train.updates in saved or config.data.text:
        return
    before, now = dataset_of(workdir), ""
    with contextlib.suppress(UserError):  # it is not found: said where rows are made
        now = dataset_version(config.data)
    if before and now and before != now:
        raise UserError(
            f"{workdir} was trained on another dataset, which would change its result ({before} -> {now}): "
            f"set --config.data.dataset={before}, or take another --workdir"
        )


def dataset_of(workdir: Path) -> str:
    """name:version of the dataset that the run was trained on; empty where none is told."""
    return read_facts(workdir).get("rows", {}).get("train", {}).get("dataset", "")


def keys_of(prepared: Prepared) -> dict[str, Any]:
    """What decides the rows of each split: dataset version, tokenizer, packing, length."""
    return {"train": prepared.train.manifest["key"], "validation": prepared.validation.manifest["key"]}


def check_rows(workdir: Path, rows: dict[str, Any]) -> None:
    """UserError where the run in `workdir` was trained on other rows: newer text, another tokenizer file."""
    saved = updates_saved(workdir)
    facts = read_facts(workdir) if saved else {}
    if saved and "rows" not in facts:
        raise UserError(f"{workdir / FACTS} does not say what the run was trained on: bring it back")
    before = facts.get("rows", {})
    told = [(split, key, was, rows[split].get(key)) for split in before for key, was in before[split].items()]
    for split, key, was, now in told:
        if was != now:
            raise UserError(
                f"{workdir} was trained on other rows, which would change its result ({split} {key}: "
                f"{was} -> {now}): bring them back, or take another --workdir"
            )


def special(workdir: Path, config: Config) -> dict[str, Any]:
    """{"special": those ids of the imported model that the run began with}, for `begin`; else nothing.

    A run that goes on has them from itself: that model may be gone.
    """
    if not config.train.init_from:
        return {}
    told = read_facts(workdir if updates_saved(workdir) else Path(config.train.init_from).expanduser())
    return {"special": told["special"]} if "special" in told else {}


def begin(writer: Writer, config: Config, *, rows: dict[str, Any], **more: Any) -> None:
    """Writes config.json and run.json: counts, `more` (the unigram's perplexity), the rows, versions."""
    count = shapes.count(config)
    facts = {
        "trained": count.trained,
        "frozen": count.frozen,
        "full_rank_total": count.full_rank_total,
        "reduction_percent": count.reduction_percent,
        **more,
        "rows": rows,
        "versions": {name: version(name) for name in PACKAGES},
        "devices": [str(device) for device in jax.devices()],
    }
    writer.write(CONFIG, to_json(config))
    writer.write(FACTS, json.dumps(facts, indent=2) + "\n")
