"""Where things lie: what is made once, under the user's cache; datasets, where TFDS looks.

Nothing is created at import, and the environment is read at each call.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/relora_jax, else ~/.cache/relora_jax: tokenizers, rows, compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "relora_jax"


def datasets_dir() -> Path:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets: where TFDS itself looks."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def make_once(path: Path, make: Callable[[Path], object], *, variable: str, resume: bool = False) -> Path:
    """After the call `path` is there, whole: made aside by `make(aside)`, then renamed.

    One process makes, others wait for it. A kill at any moment leaves at most `path`.partial, which
    nobody reads and the next maker removes; with `resume` it goes on with what is there. `variable` is
    the environment variable that moves the place, named when it cannot be written.
    """
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115  (its `with` is below)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror}): set {variable} to another place"
        ) from error
    with lock:
        _wait_for(lock, path)
        if not path.exists():
            aside = path.with_name(f"{path.name}.partial")
            if not resume:
                remove(aside)
            make(aside)
            aside.rename(path)
    return path


def _wait_for(lock: IO[str], path: Path) -> None:
    """The lock is ours; it dies with the process, however that dies."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"waiting for another process to make {path}", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def remove(path: Path) -> None:
    """The file or directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
