"""Where a run lies: in a local directory, a `pathlib.Path`, or at gs://bucket/run, an `epath.Path`.

An object store has whole objects only: a write replaces one in one step; nothing is appended, renamed or
locked. Directories are common beginnings of names. The functions of this module that take an `AnyPath` do
what is nearest to what they do on a disk.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec.config
from etils import epath
from typing_extensions import TypeIs

from relora_jax.errors import UserError

AnyPath = Path | epath.Path

# gcsfs waits 1, 2, 4, ... 32 s between tries, about 95 s in all; its own 6 tries end after 33 s.
TRIES = 8
# Packages whose errors need not be OSErrors: gcsfs, what it calls, and what tensorboardX calls.
_PACKAGES = {"gcsfs", "google", "aiohttp", "requests"}


def any_path(text: str) -> AnyPath:
    """The path of a local directory, with ~ expanded, or one at gs://.

    UserError for another URL, or if gcsfs or the credentials are missing; OSError if the store fails.
    """
    scheme, is_url, rest = text.partition("://")
    if not is_url:
        return Path(text).expanduser()
    if scheme != "gs" or not rest.strip("/"):
        raise UserError(f"{text!r} is not a directory for runs: use a local path, or gs://bucket/run")
    _configure()
    try:
        (path := epath.Path(text)).exists()
    except ImportError as error:
        raise UserError(f"{text!r} needs gcsfs ({error}): pip install 'relora-jax[gcs]'") from error
    except Exception as error:
        if isinstance(error, OSError) or not type(error).__module__.startswith("google.auth"):
            raise OSError(f"{text!r} cannot be read ({_reason(error)})") from error
        raise UserError(f"{text!r} cannot be read ({_reason(error)}): check your credentials") from error
    return path


def local_path(text: str, *, flag: str) -> Path:
    """The local path, with ~ expanded. UserError for a URL, as the value of `flag`."""
    if "://" in text:
        raise UserError(f"{flag}={text} is a URL: use a local path, and copy its content")
    return Path(text).expanduser()


def is_remote(path: AnyPath) -> TypeIs[epath.Path]:
    """Whether the path is in an object store."""
    return isinstance(path, epath.Path)


def entries(folder: AnyPath) -> list[Any]:
    """The paths in a directory; none if it does not exist. OSError if an object store fails."""
    if not is_remote(folder):
        return list(folder.iterdir()) if folder.is_dir() else []
    with store_errors_as_os_errors(folder), contextlib.suppress(FileNotFoundError):
        return list(folder.iterdir())  # epath's is_dir is False if the store fails
    return []


def file_system(path: AnyPath) -> Any:
    """fsspec's file system of a path in an object store."""
    return fsspec.core.url_to_fs(os.fspath(path))[0]


def is_store_error(error: BaseException) -> bool:
    """Whether the libraries of an object store raised this, and no OSError: the network or access failed."""
    return not isinstance(error, OSError) and type(error).__module__.partition(".")[0] in _PACKAGES


@contextlib.contextmanager
def store_errors_as_os_errors(path: AnyPath) -> Iterator[None]:
    """Raises errors of the libraries of an object store as OSErrors that name `path`."""
    try:
        yield
    except Exception as error:
        if not is_store_error(error):
            raise
        raise OSError(f"{path}: {_reason(error)}") from error


@functools.cache
def _configure() -> None:
    """Sets the options of gcsfs, once, unless fsspec's own configuration sets them."""
    # other processes, and TensorStore in this one, write objects that a cached listing does not have
    fsspec.config.conf["gcs"] = {"use_listings_cache": False, **fsspec.config.conf.get("gcs", {})}
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs errors that it also raises
    with contextlib.suppress(ImportError):  # reported when the path is read
        from gcsfs.core import GCSFileSystem  # pyright: ignore  (an extra)
        from gcsfs.retry import retry_request  # pyright: ignore

        # its number of tries is fixed when the class is defined, and is not an option of an instance
        patient: Any = retry_request(retries=TRIES)  # pyright: ignore
        GCSFileSystem._request = patient(GCSFileSystem._request.__wrapped__)


def _reason(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
