"""Row stores in the cache: found by what decides their rows, or made.

rows/<hash of the key>/<part>, part train or validation; two parts where one reading gives both.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from relora_jax.data import workers
from relora_jax.data.rows import MANIFEST, RowStore, check_open_files
from relora_jax.data.shards import BLOCKS, Advance, Block, End, Job
from relora_jax.data.source import Source
from relora_jax.errors import UserError
from relora_jax.storage import atomic, places

ONE_DOCUMENT = (
    "is one document, and nothing of it can be held out: split it into several .txt files, or write .jsonl "
    "with a line a document"
)
BUILD_LIMIT_BYTES = 100_000_000  # above it, `train` does not prepare by itself
DROPPED = 0.05  # a larger share of lost tokens is told
REMEDIES = {
    "concatenate": "fell off where blocks and files end: join small files, or shorten data.sequence_length",
    "truncate": "lay behind data.sequence_length: raise it, or set data.packing=concatenate",
}
_TEXT = ("dataset", "split", "text", "text_field")  # of a key: which text it is


class How(NamedTuple):
    """How rows are made where they are not there yet; nothing here decides what they are."""

    build_limit_bytes: int | float = BUILD_LIMIT_BYTES
    workers: int = 1  # 1: in this process
    progress: bool = False
    command: str = "python -m relora_jax.prepare --config=..."  # that makes what is above the limit


def row_stores(
    key: dict[str, Any], parts: tuple[str, ...], job: Callable[[Path], Job], how: How
) -> list[RowStore]:
    """The stores of `parts` under `key`; a kill loses at most the blocks that were being made."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = places.cache_dir() / "rows" / name

    def make(aside: Path) -> None:
        _make(job(aside), key, how)

    if not path.exists():
        atomic.make_once(path, make, variable="XDG_CACHE_HOME", resume=True)
        atomic.remove(path / BLOCKS)
    return [RowStore.open(path / part) for part in parts]


def check_size(source: Source, key: dict[str, Any], how: How) -> None:
    """UserError where rows of so much text are made only by command; it says what else is there."""
    if source.bytes <= how.build_limit_bytes:
        return
    size, limit = (f"{number / 1e6:,.0f} MB" for number in (source.bytes, how.build_limit_bytes))
    others = "; ".join(dict.fromkeys(_differences(key)))
    raise UserError(
        f"{source.name} holds {size}, and above {limit} rows are made only by command: {how.command}"
        + (f" (rows of this text are there with {others})" if others else "")
    )


def versions_made(name: str) -> set[str]:
    """The versions of a TFDS dataset that whole stores hold rows of."""
    made = [str(key.get("dataset", "")).rpartition(":") for key in _keys()]
    return {version for dataset, _, version in made if dataset == name}


def _keys() -> Iterator[dict[str, Any]]:
    """The key of each part of each whole store."""
    for file in sorted((places.cache_dir() / "rows").glob(f"*/*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if file.parents[1].suffix == "" and isinstance(key := json.loads(file.read_text())["key"], dict):
                yield key


def _differences(key: dict[str, Any]) -> Iterator[str]:
    """What the other stores of the same text have, and `key` has not."""
    for other in _keys():
        with contextlib.suppress(KeyError):
            same = all(other.get(name) == key.get(name) for name in _TEXT if name in key)
            differs = [name for name in key if name not in _TEXT and other[name] != key[name]]
            if same and differs:
                yield " and ".join(f"{n} {other[n]}, this config says {key[n]}" for n in differs)


class InOrder:
    """Blocks and ends, added as they come: `taken` are the blocks from the first on that are there, in order.

    `whole` once they are a store's: all of the files' blocks, or those up to the first at which part 0 has
    `train_tokens` (0: no end).
    """

    def __init__(self, files: int, train_tokens: int) -> None:
        self._files, self._train_tokens = files, train_tokens
        self._blocks: dict[tuple[int, int], Block] = {}
        self._ends: dict[int, int] = {}
        self._next, self._tokens = (0, 0), 0
        self.taken: list[Block] = []
        self.whole = files == 0

    def add(self, message: Block | End) -> None:
        """One more, and what it makes a row of with those that came too early."""
        if isinstance(message, Block):
            self._blocks[message.file, message.number] = message
        else:
            self._ends[message.file] = message.blocks
        file, number = self._next
        while not self.whole:
            if (block := self._blocks.get((file, number))) is not None:
                self.taken.append(block)
                self._tokens += block.parts[0]["tokens"]
                number += 1
                self.whole = 0 < self._train_tokens <= self._tokens
            elif self._ends.get(file) == number:
                file, number = file + 1, 0
                self.whole = file == self._files
            else:
                break
        self._next = file, number


def _make(job: Job, key: dict[str, Any], how: How) -> None:
    """The stores of a job in its folder, from the blocks that are there and those that are not."""
    blocks, ends = job.found()
    source, budget = job.source, key["train_tokens"]
    order = InOrder(source.files, budget)
    for found in (*blocks, *ends):
        order.add(found)
    if not order.whole:
        if not budget:  # else they may end before
            check_open_files(len(source.stripes(1)), source.name)  # a stripe gives a block or more
        left = _left(source.stripes(how.workers), blocks, ends)
        with (
            _forgotten(job.folder, key),
            _bar(job, blocks, budget, how) as advance,
            contextlib.closing(workers.run(job.work, left, how.workers)) as messages,
        ):
            for message in messages:
                if isinstance(message, Advance):
                    advance(message)
                    continue
                order.add(message)
                if order.whole:
                    break
    assert order.whole, "every block was made"
    _finish(job, key, order.taken)


@contextlib.contextmanager
def _forgotten(folder: Path, key: dict[str, Any]) -> Iterator[None]:
    """Files that must be mended get another key: what was made of them is of no use any more."""
    try:
        yield
    except ValueError:
        if "text" in key:
            atomic.remove(folder)
        raise


def _left(stripes: Sequence[Any], blocks: Sequence[Block], ends: Sequence[End]) -> list[Any]:
    """The stripes that something is missing of."""
    counts, there = dict(ends), {(block.file, block.number) for block in blocks}
    return [
        stripe
        for stripe in stripes
        if stripe.file not in counts
        or any((stripe.file, n) not in there for n in range(counts[stripe.file]) if n in stripe)
    ]


def _finish(job: Job, key: dict[str, Any], blocks: Sequence[Block]) -> None:
    source, name = job.source, job.source.name
    facts = {
        "key": key,
        "text": {"files": len({block.file for block in blocks}), "of_files": source.files},
    }
    facts["text"]["of_documents"] = source.documents
    for at, part in enumerate(job.parts):
        if not sum(block.parts[at]["rows"] for block in blocks):
            raise _too_little(job, part, sum(one["documents"] for block in blocks for one in block.parts))
    manifests = job.finish(blocks, facts)
    for part, manifest in manifests.items():
        if manifest["dropped"] > DROPPED:
            share = f"{100 * manifest['dropped']:.0f}% of the {part} tokens of {name}"
            print(f"{share} {REMEDIES[job.packing]}", file=sys.stderr)
    wanted, got = key["train_tokens"], manifests[job.parts[0]]["tokens"]
    if got < wanted:
        print(f"{name} gives {got:,} tokens, of data.train_tokens={wanted:,}", file=sys.stderr)


def _too_little(job: Job, part: str, documents: int) -> UserError:
    if len(job.parts) > 1 and documents == 1:
        return UserError(f"{job.source.name} {ONE_DOCUMENT}")
    what = f"{job.source.name}: the {part} part has too little text for one row"
    if len(job.parts) > 1 and part == "validation":
        return UserError(f"{what}, so nothing is held out: raise data.validation_fraction or give more text")
    return UserError(
        f"{what} of data.sequence_length={job.sequence_length}: choose a smaller length or another split"
    )


@contextlib.contextmanager
def _bar(job: Job, blocks: Sequence[Block], budget: int, how: How) -> Iterator[Callable[[Advance], None]]:
    """A progress bar with tokens/s and the time left: in tokens to a budget, else through the source."""
    tokens, size = sum(b.parts[0]["tokens"] for b in blocks), sum(b.size for b in blocks)
    unit, total, done = (" tokens", budget, tokens) if budget else (job.source.unit, job.source.size, size)
    made = 0
    with tqdm(
        total=total,
        initial=done,
        desc="+".join(job.parts),
        unit=unit,
        unit_scale=unit != " documents",
        smoothing=0,
        dynamic_ncols=True,
        disable=not how.progress,
    ) as bar:

        def advance(message: Advance) -> None:
            nonlocal made
            made += message.tokens
            elapsed_s = bar.format_dict["elapsed"] if how.progress else 0
            bar.set_postfix_str(f"{made / elapsed_s:,.0f} tokens/s" if elapsed_s else "", refresh=False)
            bar.update(message.tokens if budget else message.size)

        yield advance
