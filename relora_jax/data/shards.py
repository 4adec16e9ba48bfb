"""Turns blocks of text into shards of rows, and records of finished blocks into manifests.

An unfinished store is a directory with one subdirectory of shards per part (train, validation), and `blocks/`
with one file per finished block and one per input file that was read to its end. All files are written under
a temporary name and renamed, so a kill loses only the blocks in progress.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from relora_jax.data.packing import Packer
from relora_jax.data.rows import COUNTS, FORMAT, MANIFEST, RowStore, RowWriter, record_type
from relora_jax.data.source import Chunk, Source, Stripe
from relora_jax.storage import atomic
from relora_jax.tokenizer.tokenizer import Tokenizer

BLOCKS = "blocks"
MAX_PROBLEMS = 10  # bad documents that are named
COUNTS_SUFFIX = ".counts.npy"  # of a block's counts


class Progress(NamedTuple):
    """How much of the source was just read (in its `size`), and the number of its tokens."""

    size: float
    tokens: int


class Block(NamedTuple):
    """A finished block: its share of the source's `size`; of each part documents, rows, tokens, tokens given.

    `skipped`: the number of its bad documents, and `problems` the first of them; `skips`: whether they were
    skipped rather than refused. The counts of each piece are in a file of their own, too large to keep in
    memory.
    """

    file: int
    number: int
    size: float
    parts: list[dict[str, int]]
    skipped: int = 0
    problems: Sequence[str] = ()
    skips: bool = False


class End(NamedTuple):
    """An input file was read to its end and has this many blocks, or fewer if bad documents are skipped."""

    file: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Job:
    """Turns the blocks of `source` into shards under `folder`; sent to the workers."""

    folder: Path
    parts: tuple[str, ...]
    source: Source
    tokenizer: Tokenizer
    packing: str
    sequence_length: int
    one_thread: bool

    def work(self, stripe: Stripe) -> Iterator[Progress | Block | End]:
        """Builds the blocks of a stripe that do not exist yet, reporting progress."""
        number = -1
        with contextlib.closing(self.source.blocks(stripe.file)) as blocks:
            for number, chunks in enumerate(blocks):
                if number in stripe and not self._record(stripe.file, number).exists():
                    yield from self._build(stripe.file, number, chunks)
        end = End(stripe.file, number + 1)
        atomic.write(self.folder / BLOCKS / f"{stripe.file:05d}.end", json.dumps(end).encode())
        yield end

    def finished(self) -> tuple[list[Block], list[End]]:
        """The finished blocks, and the input files whose number of blocks is known."""
        folder = self.folder / BLOCKS
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            (self.folder / part).mkdir(exist_ok=True)
        blocks = [Block(*fields) for fields in _readable(folder.glob("*.json"))]
        intact = [block for block in blocks if self._intact(block)]
        usable = _usable(intact, skips=self.source.skip_bad_documents)
        for file, number in {(b.file, b.number) for b in blocks} - {(b.file, b.number) for b in usable}:
            self._record(file, number).unlink()
        return usable, [End(*fields) for fields in _readable(folder.glob("*.end"))]

    def _intact(self, block: Block) -> bool:
        """Whether shards and counts exist: they may have been deleted or truncated."""
        name = f"{_name(block.file, block.number)}.array_record"
        parts = zip(self.parts, block.parts, strict=True)
        shards_exist = all((self.folder / part / name).exists() for part, facts in parts if facts["rows"])
        try:
            return shards_exist and len(self._counts(block)) == 2
        except (OSError, ValueError, EOFError):
            return False

    def _counts(self, block: Block) -> np.ndarray:
        """[2, n]: flat indices into an array [parts, vocab_size], and their nonzero counts."""
        return np.load(self._record(block.file, block.number).with_suffix(COUNTS_SUFFIX), mmap_mode="r")

    def _record(self, file: int, number: int) -> Path:
        return self.folder / BLOCKS / f"{_name(file, number)}.json"

    def _build(self, file: int, number: int, chunks: Iterator[Chunk]) -> Iterator[Progress | Block]:
        shards = [_Shard(self, part, f"{_name(file, number)}.array_record") for part in self.parts]
        size, skipped, problems = 0.0, 0, list[str]()
        with contextlib.ExitStack() as writers:
            for shard in shards:
                writers.enter_context(shard.writer)
            for chunk in chunks:
                encoded = self._encode(chunk.texts)
                parts = [self.source.part(text) for text in chunk.texts]
                for index, shard in enumerate(shards):
                    shard.add([ids for ids, part in zip(encoded, parts, strict=True) if part == index])
                size += chunk.size
                skipped += len(chunk.skipped)
                problems += chunk.skipped[: MAX_PROBLEMS - len(problems)]
                yield Progress(chunk.size, sum(map(len, encoded)))
        record = self._record(file, number)
        counts = np.concatenate([shard.writer.counts for shard in shards])
        nonzero = np.flatnonzero(counts)  # few, if the file is short
        atomic.write(record.with_suffix(COUNTS_SUFFIX), _npy(np.stack([nonzero, counts[nonzero]])))
        facts, skips = [shard.facts() for shard in shards], self.source.skip_bad_documents
        block = Block(file, number, size, facts, skipped, problems, skips)
        atomic.write(record, json.dumps(block).encode())
        yield block

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """The ids of each text; encoding texts one by one keeps a tokenizer to one thread."""
        if not self.one_thread:
            return self.tokenizer.encode_documents(texts)
        return [ids for text in texts for ids in self.tokenizer.encode_documents([text])]

    def finish(self, blocks: Sequence[Block], facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Completes a store per part from `blocks`, in this order, without other shards; the manifests."""
        counts = np.zeros((len(self.parts), self.tokenizer.vocab_size), np.int64)
        for block in blocks:
            nonzero, block_counts = self._counts(block)
            counts.reshape(-1)[nonzero] += block_counts
        manifests = {}
        for index, part in enumerate(self.parts):
            manifest = manifests[part] = {**self._manifest(blocks, index), **facts}
            store = self.folder / part
            listed = {shard["file"] for shard in manifest["shards"] if shard["rows"]}
            for extra in [entry for entry in store.iterdir() if entry.name not in listed]:
                extra.unlink(missing_ok=True)
            atomic.write(store / COUNTS, _npy(counts[index]))
            atomic.write(store / MANIFEST, f"{json.dumps(manifest, indent=2)}\n".encode())
            RowStore.open(store)  # detects incomplete writes before the store gets its final name
        return manifests

    def _manifest(self, blocks: Sequence[Block], index: int) -> dict[str, Any]:
        """The manifest of part `index`; `dropped` is the fraction of its tokens that are in no row."""
        record = record_type(sequence_length=self.sequence_length, vocab_size=self.tokenizer.vocab_size)
        shards = [
            {"file": f"{_name(block.file, block.number)}.array_record", **block.parts[index]}
            for block in blocks
        ]
        total = {name: sum(s[name] for s in shards) for name in ("documents", "rows", "tokens", "given")}
        return {
            "format": FORMAT,
            "part": self.parts[index],
            "packing": self.packing,
            "sequence_length": self.sequence_length,
            "vocab_size": self.tokenizer.vocab_size,
            "eos": self.tokenizer.eos,
            "pad": self.tokenizer.pad,
            **total,
            "dropped": 1 - total["tokens"] / max(1, total["given"]),
            "record": str(record),
            "shards": shards,
        }


class _Shard:
    """The rows of one part of one block."""

    def __init__(self, job: Job, part: str, file: str) -> None:
        ids = {"eos": job.tokenizer.eos, "pad": job.tokenizer.pad, "bos": job.tokenizer.bos}
        self._packer = Packer(job.packing, length=job.sequence_length, **ids)
        shape = {"sequence_length": job.sequence_length, "vocab_size": job.tokenizer.vocab_size}
        self.writer = RowWriter(job.folder / part / file, **shape)
        self._documents = 0

    def add(self, documents: list[np.ndarray]) -> None:
        self._documents += len(documents)
        self.writer.write(*self._packer.add(documents))

    def facts(self) -> dict[str, int]:
        """Its numbers for the manifest."""
        return {
            "documents": self._documents,
            "rows": self.writer.rows,
            "tokens": int(self.writer.counts.sum()),
            "given": self._packer.tokens,
        }


def _usable(blocks: Sequence[Block], *, skips: bool) -> list[Block]:
    """The blocks that `skips` leaves as they are: those built with it, and the first ones of a file.

    Behind a bad document, or a block that may have one, blocks start elsewhere if it is skipped.
    """
    finished = {(block.file, block.number): block for block in blocks}
    same = dict[int, int]()  # blocks of a file that are the same with and without skipping
    for file, number in sorted(finished):
        if number == same.setdefault(file, 0) and not finished[file, number].skipped:
            same[file] += 1
    return [block for block in blocks if block.skips == skips or block.number < same[block.file]]


def _name(file: int, number: int) -> str:
    return f"{file:05d}-{number:05d}"


def _readable(files: Iterable[Path]) -> Iterator[list[Any]]:
    """The list in each file, by file name; deletes empty and truncated files, so that they are rebuilt."""
    for file in sorted(files):
        with contextlib.suppress(ValueError):
            if isinstance(fields := json.loads(file.read_bytes()), list):
                yield fields
                continue
        file.unlink()


def _npy(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
