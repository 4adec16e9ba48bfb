"""Decompresses streams by the ending of a file's name: .gz, .bz2, .xz and .zst."""

import bz2
import gzip
import importlib
import io
import lzma
import sys
from typing import Any

from relora_jax.errors import UserError

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
ZSTD_WINDOW_LOG = 31  # the largest that zstd writes (--long=31), 2 GiB; the library's default is 27


class Damaged(Exception):  # noqa: N818
    """The stream ends too early, or cannot be decompressed; the message is the reason."""


def _zstd(raw: io.BufferedIOBase) -> Any:
    zstd = zstd_module()
    return zstd.ZstdFile(raw, options={zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG})


ENDINGS = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": _zstd,
}


def zstd_module() -> Any:
    """Python 3.14's compression.zstd, or its backport; UserError if that is not installed."""
    try:
        return importlib.import_module(ZSTD)
    except ImportError:
        raise UserError(f"a .zst file requires {ZSTD}: pip install 'relora-jax[arrow]'") from None


def opened(raw: io.BufferedReader, ending: str) -> io.BufferedReader:
    """The decompressed content of `raw`, or `raw` itself if `ending` is empty.

    Reads raise Damaged if the content is, OSError if the disk fails.
    """
    return io.BufferedReader(_Checked(ENDINGS[ending](raw)), 2**17) if ending else raw


class _Checked(io.RawIOBase):
    """A decompressor whose errors are `Damaged`, whatever class each library gives them."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto1(buffer)
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:  # the operating system's
                raise
            raise Damaged(error) from error
