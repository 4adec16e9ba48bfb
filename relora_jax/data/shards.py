"""Blocks of text -> shards of rows, each finished one with what the manifest will need of it.

A store in the making is a directory: the shards of each part (train, validation) in a directory of its own,
and `blocks/`, which holds a file for each finished block and one for each input file that was read to its
end. Both are written aside and renamed, so that a kill loses the blocks that were being made, and no other.
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
COUNTED = ".counts.npy"  # ends the name of a block's counts


class Advance(NamedTuple):
    """So much more of the source was read, and so many tokens came of it."""

    size: float
    tokens: int


class Block(NamedTuple):
    """A finished block: `size` of its source, and of each part the documents, rows, tokens and tokens given.

    The counts of each piece of each part lie beside them on the disk, too large to keep.
    """

    file: int
    number: int
    size: float
    parts: list[dict[str, int]]


class End(NamedTuple):
    """An input file has so many blocks."""

    file: int
    blocks: int


@dataclasses.dataclass(frozen=True)
class Job:
    """What turns the blocks of `source` into shards under `folder`; sent to the workers."""

    folder: Path
    parts: tuple[str, ...]
    source: Source
    tokenizer: Tokenizer
    packing: str
    sequence_length: int
    one_thread: bool

    def work(self, stripe: Stripe) -> Iterator[Advance | Block | End]:
        """Makes the blocks of a stripe that are not there yet, and says what it does."""
        number = -1
        with contextlib.closing(self.source.blocks(stripe.file)) as blocks:
            for number, chunks in enumerate(blocks):
                if number in stripe and not self._record(stripe.file, number).exists():
                    yield from self._make(stripe.file, number, chunks)
        end = End(stripe.file, number + 1)
        atomic.write(self.folder / BLOCKS / f"{stripe.file:05d}.end", json.dumps(end).encode())
        yield end

    def found(self) -> tuple[list[Block], list[End]]:
        """The blocks that are finished, and the files whose number of blocks is known."""
        folder = self.folder / BLOCKS
        folder.mkdir(parents=True, exist_ok=True)
        for part in self.parts:
            (self.folder / part).mkdir(exist_ok=True)
        blocks = [Block(*told) for told in _readable(folder.glob("*.json"))]
        for lost in [block for block in blocks if not self._whole(block)]:
            self._record(lost.file, lost.number).unlink()
            blocks.remove(lost)
        return blocks, [End(*told) for told in _readable(folder.glob("*.end"))]

    def _whole(self, block: Block) -> bool:
        """Whether shards and counts are there: someone may have deleted them, or cut them short."""
        name = f"{_name(block.file, block.number)}.array_record"
        parts = zip(self.parts, block.parts, strict=True)
        shards = all((self.folder / part / name).exists() for part, facts in parts if facts["rows"])
        try:
            return shards and len(self._counts(block)) == 2
        except (OSError, ValueError, EOFError):
            return False

    def _counts(self, block: Block) -> np.ndarray:
        """[2, n]: places in an array [parts, vocab_size], and the counts there; read where they are used."""
        return np.load(self._record(block.file, block.number).with_suffix(COUNTED), mmap_mode="r")

    def _record(self, file: int, number: int) -> Path:
        return self.folder / BLOCKS / f"{_name(file, number)}.json"

    def _make(self, file: int, number: int, chunks: Iterator[Chunk]) -> Iterator[Advance | Block]:
        shards = [_Shard(self, part, f"{_name(file, number)}.array_record") for part in self.parts]
        size = 0.0
        with contextlib.ExitStack() as writers:
            for shard in shards:
                writers.enter_context(shard.writer)
            for chunk in chunks:
                encoded = self._encode(chunk.texts)
                places = [self.source.part(text) for text in chunk.texts]
                for at, shard in enumerate(shards):
                    shard.add([ids for ids, place in zip(encoded, places, strict=True) if place == at])
                size += chunk.size
                yield Advance(chunk.size, sum(map(len, encoded)))
        record = self._record(file, number)
        counts = np.concatenate([shard.writer.counts for shard in shards])
        counted = np.flatnonzero(counts)  # few, where a file is short
        atomic.write(record.with_suffix(COUNTED), _saved(np.stack([counted, counts[counted]])))
        block = Block(file, number, size, [shard.facts() for shard in shards])
        atomic.write(record, json.dumps(block).encode())
        yield block

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text; a list of one text keeps a tokenizer to one thread."""
        if not self.one_thread:
            return self.tokenizer.encode_documents(texts)
        return [ids for text in texts for ids in self.tokenizer.encode_documents([text])]

    def finish(self, blocks: Sequence[Block], facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The parts become stores of `blocks`, in that order; shards of other blocks go. Their manifests."""
        counts = np.zeros((len(self.parts), self.tokenizer.vocab_size), np.int64)
        for block in blocks:
            counted, of_block = self._counts(block)
            counts.reshape(-1)[counted] += of_block
        manifests = {}
        for at, part in enumerate(self.parts):
            manifest = manifests[part] = {**self._manifest(blocks, at), **facts}
            place = self.folder / part
            listed = {shard["file"] for shard in manifest["shards"] if shard["rows"]}
            for extra in [entry for entry in place.iterdir() if entry.name not in listed]:
                extra.unlink(missing_ok=True)
            atomic.write(place / COUNTS, _saved(counts[at]))
            atomic.write(place / MANIFEST, f"{json.dumps(manifest, indent=2)}\n".encode())
            RowStore.open(place)  # what did not reach the disk shows before the store has its name
        return manifests

    def _manifest(self, blocks: Sequence[Block], at: int) -> dict[str, Any]:
        """What part `at` holds; `dropped` is the share of its tokens that are in no row."""
        record = record_type(sequence_length=self.sequence_length, vocab_size=self.tokenizer.vocab_size)
        shards = [
            {"file": f"{_name(block.file, block.number)}.array_record", **block.parts[at]} for block in blocks
        ]
        total = {name: sum(s[name] for s in shards) for name in ("documents", "rows", "tokens", "given")}
        return {
            "format": FORMAT,
            "part": self.parts[at],
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
        """Of the manifest."""
        return {
            "documents": self._documents,
            "rows": self.writer.rows,
            "tokens": int(self.writer.counts.sum()),
            "given": self._packer.given,
        }


def _name(file: int, number: int) -> str:
    return f"{file:05d}-{number:05d}"


def _readable(files: Iterable[Path]) -> Iterator[list[Any]]:
    """The list in each file, in the order of their names; what is empty or cut goes, to be made again."""
    for file in sorted(files):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(file.read_bytes()), list):
                yield found
                continue
        file.unlink()


def _saved(array: np.ndarray) -> bytes:
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
