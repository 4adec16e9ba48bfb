"""Rows of a run in an object store: ArrayRecord reads files, so each host copies them to its disk once."""

import sys
from collections.abc import Iterable
from pathlib import Path

from relora_jax.data.rows import RowStore
from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath, file_system, is_remote, store_errors_as_os_errors

FOLDER = "rows"  # in the workdir, with a folder for each key, as in the cache
COMPLETE = "complete"  # an object that is written last


def copies_of(workdir: AnyPath) -> AnyPath | None:
    """Where the rows of a run are, besides this machine's cache; None for a local run."""
    return workdir / FOLDER if is_remote(workdir) else None


def is_complete(copy: AnyPath) -> bool:
    """Whether all rows of a key are in `copy`."""
    with store_errors_as_os_errors(copy):
        return (copy / COMPLETE).exists()


def copy_to(folder: Path, copy: AnyPath) -> None:
    """Copies the rows in `copy` to a local folder, and says so."""
    print(f"copying rows from {copy} to this machine", file=sys.stderr, flush=True)
    with store_errors_as_os_errors(copy):
        file_system(copy).get(f"{copy}/", f"{folder}/", recursive=True)
    (folder / COMPLETE).unlink()


def publish(stores: Iterable[RowStore], copies: AnyPath) -> None:
    """Copies the rows of `stores` to `copies`, unless they are complete there, and says so."""
    for folder in dict.fromkeys(store.path.parent for store in stores):
        if is_complete(copy := copies / folder.name):
            continue
        print(f"copying rows to {copy}, from which other machines copy them", file=sys.stderr, flush=True)
        with store_errors_as_os_errors(copy):
            file_system(copy).put(f"{folder}/", f"{copy}/", recursive=True)
        atomic.write(copy / COMPLETE, b"")
