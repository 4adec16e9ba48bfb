"""A run's directory at its start: locking it, checking that this run may use it, writing config and facts."""

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
from relora_jax.data import copies
from relora_jax.data.prepared import Prepared, dataset_version
from relora_jax.errors import UserError
from relora_jax.run.record import CONFIG, FACTS, LOCK, read_config, read_facts
from relora_jax.storage import atomic, lock
from relora_jax.storage.location import AnyPath, any_path, entries, is_remote
from relora_jax.storage.writer import Writer

TEMPORARY_SUFFIXES = (".new", ".tmp")  # of files that a killed process may leave; .tmp by earlier versions
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


class InUseError(UserError):
    """Another process trains the run."""


@contextlib.contextmanager
def locked(writer: Writer, config: Config) -> Iterator[None]:
    """Creates the directory for the run of `config` and locks it against other processes.

    UserError if it holds another run or anything else, or is in use. Whatever this creates is removed if the
    `with` ends with an error before a run was written.
    """
    workdir = writer.folder
    _check_is_run_or_empty(workdir)
    if not writer.active:
        check(workdir, config)
        yield
        return

    def refuse(process: str) -> None:
        raise InUseError(f"{workdir} is in use by process {process}: wait for it, or use another --workdir")

    file, new_folders, is_new = workdir / LOCK, list[Path](), False
    if not is_remote(workdir):
        new_folders = [path for path in (workdir, *workdir.absolute().parents) if not path.exists()]
        is_new = not file.exists()
    try:
        _make_writable(workdir)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"workdir {str(workdir)!r} cannot be written ({reason}): use another --workdir"
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
                for path in new_folders:
                    path.rmdir()  # fails if it is not empty
            raise


def check_is_shared(workdir: AnyPath, pid: int) -> None:
    """UserError if the process `pid`, which holds the lock, did not write it into this directory."""
    if is_remote(workdir):
        return  # one for all
    file = workdir / LOCK
    if not file.is_file() or file.read_text() != f"{pid}\n":
        raise UserError(
            f"workdir {str(workdir)!r} is not the directory of process 0: pass one that all processes share"
        )


def _make_writable(workdir: AnyPath) -> None:
    """Creates the directory; OSError if nothing can be written there."""
    if is_remote(workdir):
        try:
            atomic.write(workdir / f"writable{TEMPORARY_SUFFIXES[0]}", b"")  # `Writer.clear` removes it
        except FileNotFoundError:
            raise OSError("no such bucket") from None
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=workdir):
        pass


def _check_is_run_or_empty(workdir: AnyPath) -> None:
    """UserError if the directory exists, is not empty, and is not a run's."""
    if not is_remote(workdir) and workdir.is_symlink() and not workdir.exists():
        raise UserError(f"workdir {str(workdir)!r} is a broken symbolic link: use another --workdir")
    if (workdir / CONFIG).is_file():
        read_config(workdir)
        return
    ours = (LOCK, copies.FOLDER) if is_remote(workdir) else (LOCK,)
    others = [path for path in entries(workdir) if path.name not in ours]
    if any(path.suffix not in TEMPORARY_SUFFIXES for path in others):
        raise UserError(f"workdir {str(workdir)!r} is not empty and not a run: use another --workdir")


def check(workdir: AnyPath, config: Config) -> None:
    """UserError if the directory holds another run, or this run with another version of its dataset.

    A run without a checkpoint has nothing to lose: it may start over with another config.
    """
    if not (workdir / CONFIG).is_file():
        return
    changed = changed_results(read_config(workdir), config)
    if changed and updates_saved(workdir):
        raise UserError(
            f"{workdir} holds a run with another config; this one would change its result "
            f"({'; '.join(changed)}): restore these settings, or use another --workdir"
        )
    _check_dataset(workdir, config)


def _check_dataset(workdir: AnyPath, config: Config) -> None:
    """UserError if data.dataset resolves to another version than the run's, because a newer one was added.

    A run that is complete reads no more rows.
    """
    saved = updates_saved(workdir)
    if not saved or config.train.updates in saved or config.data.text:
        return
    before, now = dataset_of(workdir), ""
    with contextlib.suppress(UserError):  # not found: reported when the rows are prepared
        now = dataset_version(config.data)
    if before and now and before != now:
        raise UserError(
            f"{workdir} was trained on another dataset; this would change its result ({before} -> {now}): "
            f"set --config.data.dataset={before}, or use another --workdir"
        )


def dataset_of(workdir: AnyPath) -> str:
    """name:version of the dataset that the run was trained on; empty if not recorded."""
    return read_facts(workdir).get("rows", {}).get("train", {}).get("dataset", "")


def keys_of(prepared: Prepared) -> dict[str, Any]:
    """{split: whatever decides its rows: dataset version, tokenizer, packing, length}."""
    return {"train": prepared.train.manifest["key"], "validation": prepared.validation.manifest["key"]}


def check_rows(workdir: AnyPath, rows: dict[str, Any]) -> None:
    """UserError if the run in `workdir` was trained on other rows: changed text or another tokenizer."""
    saved = updates_saved(workdir)
    facts = read_facts(workdir) if saved else {}
    if saved and "rows" not in facts:
        raise UserError(f"{workdir / FACTS} does not say what the run was trained on: restore the file")
    for split, saved_key in facts.get("rows", {}).items():
        for name, before in saved_key.items():
            if before != (now := rows[split].get(name)):
                raise UserError(
                    f"{workdir} was trained on other rows; these would change its result ({split} {name}: "
                    f"{before} -> {now}): restore them, or use another --workdir"
                )


def special(workdir: AnyPath, config: Config) -> dict[str, Any]:
    """{"special": special token ids of the imported model that the run starts from}, for `begin`, or {}.

    A resumed run takes them from its own run.json, because that model may no longer exist.
    """
    if not config.train.init_from:
        return {}
    facts = read_facts(workdir if updates_saved(workdir) else any_path(config.train.init_from))
    return {"special": facts["special"]} if "special" in facts else {}


def begin(writer: Writer, config: Config, *, rows: dict[str, Any], **more: Any) -> None:
    """Writes config.json and run.json: parameter counts, `more` (unigram perplexity, say), rows, versions."""
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
