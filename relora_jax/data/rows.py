"""Rows of token ids on disk: the record format, a reader and a writer.

A store is a directory of manifest.json, counts.npy (the count of each piece) and ArrayRecord shards. A row
is S ids and their true length; S = sequence_length + 1.
"""

import bisect
import contextlib
import dataclasses
import itertools
import json
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from jaxtyping import Int32, Int64

from relora_jax.errors import UserError
from relora_jax.storage.array_record import RecordWriter

FORMAT = 4  # of a row store: increment it when the records, the packing or the manifest change
MANIFEST, COUNTS = "manifest.json", "counts.npy"
SPARE_FILES = 512  # open files for everything else


def record_type(*, sequence_length: int, vocab_size: int) -> np.dtype:
    """One record: true length (uint32), then S ids (uint16 if they fit, else uint32); little-endian."""
    ids = "<u2" if vocab_size <= 2**16 else "<u4"
    return np.dtype([("length", "<u4"), ("ids", ids, (sequence_length + 1,))])


@dataclasses.dataclass(frozen=True, eq=False)
class RowStore:
    """The rows that `prepare` wrote; `tokens` is the total number of ids, `counts` that of each piece."""

    path: Path
    rows: int
    sequence_length: int
    tokens: int
    vocab_size: int
    eos: int
    manifest: dict[str, Any]
    counts: Int64[np.ndarray, " vocab_size"]
    _source: ArrayRecordDataSource

    @classmethod
    def open(cls, path: Path) -> "RowStore":
        """The store in a directory; OSError if it is incomplete, UserError if it has too many shards."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']}, this version reads {FORMAT}")
            counts = np.load(path / COUNTS)
            shards = [str(path / shard["file"]) for shard in manifest["shards"] if shard["rows"]]
            facts = {
                name: manifest[name] for name in ("rows", "sequence_length", "tokens", "vocab_size", "eos")
            }
            allow_open_files(len(shards))
            source = ArrayRecordDataSource(shards)
            if not len(source) == facts["rows"] == sum(shard["rows"] for shard in manifest["shards"]):
                raise ValueError(f"{len(source)} of {facts['rows']} rows exist")
        except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise OSError(
                f"{path} is not a complete row store ({error}): delete it to have it built again"
            ) from error
        check_open_files(len(shards), path)
        return cls(path=path, manifest=manifest, counts=counts, _source=source, **facts)

    def read(self, indices: Sequence[int]) -> tuple[Int32[np.ndarray, "n S"], Int32[np.ndarray, " n"]]:
        """ids and true lengths of the rows at `indices`, in that order, in one read.

        OSError, naming the shard, if one is missing or damaged.
        """
        record = record_type(sequence_length=self.sequence_length, vocab_size=self.vocab_size)
        try:
            records = self._source.__getitems__(indices) if len(indices) else []
        except (RuntimeError, OSError, IndexError) as error:
            raise self._unreadable(indices, str(error)) from error
        for i, content in zip(indices, records, strict=True):
            if len(content) != record.itemsize:
                raise self._unreadable([i], f"a record has {len(content)} bytes, not {record.itemsize}")
        table = np.frombuffer(b"".join(records), record)
        return table["ids"].astype(np.int32), table["length"].astype(np.int32)

    def _unreadable(self, indices: Sequence[int], reason: str) -> OSError:
        """An error that names the first failing shard, which the library's own error does not always do."""
        ends = list(itertools.accumulate(shard["rows"] for shard in self.manifest["shards"]))
        for i in indices:
            try:
                self._source.__getitems__([i])
            except (RuntimeError, OSError, IndexError):
                break
        else:
            i = indices[0]
        file = self.path / self.manifest["shards"][bisect.bisect_right(ends, i)]["file"]
        line = reason.partition("\n")[0].partition(";")[0]
        return OSError(f"rows in {file} cannot be read ({line}): restore the file and start again")


class RowWriter:
    """Writes a shard of rows, published when its `with` ends without an error. No rows, no file.

    `rows` and `counts` (of each piece) are what was written so far. OSError if the disk fails.
    """

    def __init__(self, path: Path, *, sequence_length: int, vocab_size: int) -> None:
        self._path, self._writer = path, None
        self._type = record_type(sequence_length=sequence_length, vocab_size=vocab_size)
        self.rows, self.counts = 0, np.zeros(vocab_size, np.int64)

    def write(self, ids: Int32[np.ndarray, "n S"], lengths: Int32[np.ndarray, " n"]) -> None:
        """Adds rows."""
        records = np.zeros(len(ids), self._type)
        records["length"], records["ids"] = lengths, ids
        if self._writer is None and len(ids):
            # one record per group, or reading a row would read its whole group; ids hardly compress
            self._writer = RecordWriter(self._path, "group_size:1,uncompressed")
        for record in records:
            self._writer.write(record.tobytes())  # pyright: ignore
        self.rows += len(ids)
        true = np.arange(ids.shape[1]) < lengths[:, None]
        self.counts += np.bincount(ids[true], minlength=len(self.counts))

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*error)


def check_open_files(shards: int, name: object) -> None:
    """UserError if a process may not have this many shards open at once."""
    limit, required = allow_open_files(shards), shards + SPARE_FILES
    if limit < required:
        raise UserError(
            f"{name} has {shards:,} shards, but a process may have only {limit:,} files open: raise the hard "
            f"limit (ulimit -Hn) to {required}, or join small files into one .jsonl"
        )


def allow_open_files(shards: int) -> int:
    """The limit on open files, after raising the soft limit as needed: each shard stays open once read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    current, highest = (2**31 if limit == resource.RLIM_INFINITY else limit for limit in (soft, hard))
    required = min(highest, 2 * shards + SPARE_FILES)  # train and validation may have this many each
    if current >= required:
        return current
    with contextlib.suppress(OSError, ValueError):  # some systems allow less than they report
        resource.setrlimit(resource.RLIMIT_NOFILE, (required, hard))
        return required
    return current
