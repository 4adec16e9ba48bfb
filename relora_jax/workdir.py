"""A run's directory before and at its start: may it be used, and what is the run that it holds made of."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from relora_jax import shapes
from relora_jax.checkpoint import updates_saved
from relora_jax.config import Config, changed_results, to_json
from relora_jax.prepare import Prepared, dataset_version
from relora_jax.run import read_config, read_facts

LOCK = "lock"
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


def check(workdir: Path, config: Config) -> None:
    """ValueError where the run cannot live: another run, something else, no place to write. Writes nothing.

    A run without a checkpoint has nothing to lose: another config may begin anew in its place.
    """
    saved = workdir / "config.json"
    if workdir.is_symlink() and not workdir.exists():
        raise ValueError(f"workdir {str(workdir)!r} is a link to nowhere: take another --workdir")
    if saved.is_file():
        changed = changed_results(read_config(workdir), config)
        if changed and updates_saved(workdir):
            raise ValueError(
                f"{workdir} holds a run of another config, which would change its result "
                f"({'; '.join(changed)}): set it back, or take another --workdir"
            )
        _check_dataset(workdir, config)
    elif workdir.is_dir() and any(path.suffix != ".tmp" and path.name != LOCK for path in workdir.iterdir()):
        raise ValueError(f"workdir {str(workdir)!r} holds something else than a run: take a new one")
    there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(
            f"workdir {str(workdir)!r} cannot be written ({error.strerror}): take another --workdir"
        ) from None


def _check_dataset(workdir: Path, config: Config) -> None:
    """ValueError where data.dataset names another version than that of the run, as where a newer one came.

    A run that has done its updates reads no more.
    """
    saved = updates_saved(workdir)
    if not saved or config.train.updates in saved or config.data.text:
        return
    before, now = dataset_of(workdir), ""
    with contextlib.suppress(ValueError):  # it is not there: told where rows are made
        now = dataset_version(config.data)
    if before and now and before != now:
        raise ValueError(
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
    """ValueError where the run in `workdir` was trained on other rows: newer text, another tokenizer file."""
    saved = updates_saved(workdir)
    facts = read_facts(workdir) if saved else {}
    if saved and "rows" not in facts:
        raise ValueError(f"{workdir / 'run.json'} does not say what the run was trained on: bring it back")
    before = facts.get("rows", {})
    told = [(split, key, was, rows[split].get(key)) for split in before for key, was in before[split].items()]
    for split, key, was, now in told:
        if was != now:
            raise ValueError(
                f"{workdir} was trained on other rows, which would change its result ({split} {key}: "
                f"{was} -> {now}): bring them back, or take another --workdir"
            )


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """No other process is inside with the same directory, which is made; ValueError where one is.

    The lock dies with the process, however that dies.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"{workdir} is in use by process {file.read().strip() or '?'}: wait for its end, or take "
                "another --workdir"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def special(workdir: Path, config: Config) -> dict[str, Any]:
    """{"special": those ids of the imported model that the run began with}, for `begin`; else nothing.

    A run that goes on has them from itself: that model may be gone.
    """
    if not config.train.init_from:
        return {}
    told = read_facts(workdir if updates_saved(workdir) else Path(config.train.init_from).expanduser())
    return {"special": told["special"]} if "special" in told else {}


def begin(workdir: Path, config: Config, *, rows: dict[str, Any], **more: Any) -> None:
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
    _write(workdir / "config.json", to_json(config))
    _write(workdir / "run.json", json.dumps(facts, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """The whole text or the file as it was, also after a kill."""
    aside = path.with_suffix(".tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
