"""Row stores in the cache, looked up by a key of everything that decides their rows, or built.

Stored as rows/<hash of the key>/<part>, with part train or validation, or both if one source provides both.
"""

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from relora_jax.data import copies, workers
from relora_jax.data.rows import MANIFEST, RowStore, check_open_files
from relora_jax.data.shards import BLOCKS, MAX_PROBLEMS, Block, End, Job, Progress
from relora_jax.data.source import BadDocumentError, Source
from relora_jax.errors import UserError
from relora_jax.storage import atomic, places
from relora_jax.storage.location import AnyPath

ONE_DOCUMENT = (
    "is a single document, so nothing can be held out: split it into several .txt files, or write .jsonl "
    "with one document per line"
)
BUILD_LIMIT_BYTES = 100_000_000  # above it, `train` asks for a `prepare` command instead
DROPPED = 0.05  # a larger fraction of dropped tokens is reported
REMEDIES = {
    "concatenate": "are dropped at ends of blocks and files: join small files, or lower data.sequence_length",
    "truncate": "are dropped beyond data.sequence_length: raise it, or set data.packing=concatenate",
}
_TEXT = ("dataset", "split", "text", "text_field")  # the entries of a key that identify the text


class PrepareOptions(NamedTuple):
    """Options for building rows that are not in the cache yet; they do not affect the rows themselves."""

    build_limit_bytes: int | float = BUILD_LIMIT_BYTES
    workers: int = 1  # 1: in this process
    progress: bool = False
    skip_bad_documents: bool = False  # rows of text without bad documents are the same
    command: str = "python -m relora_jax.prepare --config=..."  # for text above the limit
    copies: AnyPath | None = None  # where rows may be copied from


def row_stores(
    key: dict[str, Any], parts: tuple[str, ...], job: Callable[[Path], Job], options: PrepareOptions
) -> dict[str, RowStore]:
    """{part: store} for `key`, built if missing; a kill loses only the blocks in progress."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    path = places.cache_dir() / "rows" / name

    if not path.exists():
        if options.copies and copies.is_complete(copy := options.copies / name):
            build = lambda folder: copies.copy_to(folder, copy)  # noqa: E731
        else:
            build = lambda folder: _build(job(folder), key, options)  # noqa: E731
        atomic.make_once(path, build, variable="XDG_CACHE_HOME", resume=True)
        shutil.rmtree(path / BLOCKS, ignore_errors=True)  # another process may be removing them, too
    return {part: RowStore.open(path / part) for part in parts}


def check_size(source: Source, key: dict[str, Any], options: PrepareOptions) -> None:
    """UserError if the text is above the limit; it mentions existing rows of the same text."""
    if source.bytes <= options.build_limit_bytes:
        return
    size, limit = (f"{number / 1e6:,.0f} MB" for number in (source.bytes, options.build_limit_bytes))
    others = "; ".join(dict.fromkeys(_differences(key)))
    raise UserError(
        f"{source.name} is {size}, and text above {limit} must be prepared first: run {options.command}"
        + (f" (rows of this text exist with {others})" if others else "")
    )


def cached_versions(name: str) -> set[str]:
    """The versions of a TFDS dataset of which complete stores exist."""
    datasets = [str(key.get("dataset", "")).rpartition(":") for key in _keys()]
    return {version for dataset, _, version in datasets if dataset == name}


def _keys() -> Iterator[dict[str, Any]]:
    """The key of each part of each complete store."""
    for file in sorted((places.cache_dir() / "rows").glob(f"*/*/{MANIFEST}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if file.parents[1].suffix == "" and isinstance(key := json.loads(file.read_text())["key"], dict):
                yield key


def _differences(key: dict[str, Any]) -> Iterator[str]:
    """The settings of other stores of the same text that differ from `key`."""
    for other in _keys():
        with contextlib.suppress(KeyError):
            same = all(other.get(name) == key.get(name) for name in _TEXT if name in key)
            differs = [name for name in key if name not in _TEXT and other[name] != key[name]]
            if same and differs:
                yield " and ".join(f"{n} {other[n]}, this config has {key[n]}" for n in differs)


class OrderedBlocks:
    """Collects blocks and ends in any order: `blocks` are the leading ones without a gap, in order.

    `complete` once they make up a store: all blocks of all files, or those up to the first with which part 0
    reaches `train_tokens` (0: no limit).
    """

    def __init__(self, files: int, train_tokens: int) -> None:
        self._files, self._train_tokens = files, train_tokens
        self._received: dict[tuple[int, int], Block] = {}
        self._ends: dict[int, int] = {}
        self._next, self._tokens = (0, 0), 0
        self.blocks: list[Block] = []
        self.complete = files == 0

    def add(self, message: Block | End) -> None:
        """Adds a message, and with it those that arrived out of order before."""
        if isinstance(message, Block):
            self._received[message.file, message.number] = message
        else:
            self._ends[message.file] = message.blocks
        file, number = self._next
        while not self.complete:
            if (block := self._received.get((file, number))) is not None:
                self.blocks.append(block)
                self._tokens += block.parts[0]["tokens"]
                number += 1
                self.complete = 0 < self._train_tokens <= self._tokens
            elif self._ends.get(file) == number:
                file, number = file + 1, 0
                self.complete = file == self._files
            else:
                break
        self._next = file, number


def _build(job: Job, key: dict[str, Any], options: PrepareOptions) -> None:
    """Builds the stores of a job in its folder, reusing blocks that are already finished."""
    blocks, ends = job.finished()
    source, budget = job.source, key["train_tokens"]
    ordered = OrderedBlocks(source.files, budget)
    for message in (*blocks, *ends):
        ordered.add(message)
    if not ordered.complete:
        if not budget:  # a budget may end before all blocks are built
            check_open_files(len(source.stripes(1)), source.name)  # each stripe has a block or more
        stripes = _unfinished(source.stripes(options.workers), blocks, ends)
        with (
            _removed_on_bad_text(job.folder, key),
            _progress_bar(job, blocks, budget, options) as advance,
            contextlib.closing(workers.run(job.work, stripes, options.workers)) as messages,
        ):
            for message in messages:
                if isinstance(message, Progress):
                    advance(message)
                    continue
                ordered.add(message)
                if ordered.complete:
                    break
    assert ordered.complete, "every block was built"
    _finish(job, key, ordered.blocks)


@contextlib.contextmanager
def _removed_on_bad_text(folder: Path, key: dict[str, Any]) -> Iterator[None]:
    """Removes `folder` if a file needs fixing: fixed files have another key, so its blocks become useless.

    Not for a bad document, which may be skipped instead.
    """
    try:
        yield
    except BadDocumentError:
        raise
    except ValueError:
        if "text" in key:
            atomic.remove(folder)
        raise


def _unfinished(stripes: Sequence[Any], blocks: Sequence[Block], ends: Sequence[End]) -> list[Any]:
    """The stripes of which a block is missing."""
    counts = {end.file: end.blocks for end in ends}
    finished = {(block.file, block.number) for block in blocks}
    return [
        stripe
        for stripe in stripes
        if stripe.file not in counts
        or any((stripe.file, n) not in finished for n in range(counts[stripe.file]) if n in stripe)
    ]


def _finish(job: Job, key: dict[str, Any], blocks: Sequence[Block]) -> None:
    source, name = job.source, job.source.name
    files = len({block.file for block in blocks})
    skipped = sum(block.skipped for block in blocks)
    text = {
        "files": files,
        "of_files": source.files,
        "of_documents": source.documents,
        "skipped": skipped,
    }
    if skipped:
        _name_skipped(name, skipped, [problem for block in blocks for problem in block.problems])
    for index, part in enumerate(job.parts):
        if not sum(block.parts[index]["rows"] for block in blocks):
            documents = sum(counts["documents"] for block in blocks for counts in block.parts)
            raise _too_little_text(job, part, documents)
    manifests = job.finish(blocks, {"key": key, "text": text})
    for part, manifest in manifests.items():
        if manifest["dropped"] > DROPPED:
            share = f"{100 * manifest['dropped']:.0f}% of the {part} tokens of {name}"
            print(f"{share} {REMEDIES[job.packing]}", file=sys.stderr)
    budget, tokens = key["train_tokens"], manifests[job.parts[0]]["tokens"]
    if tokens < budget:
        print(f"{name} has only {tokens:,} tokens, fewer than data.train_tokens={budget:,}", file=sys.stderr)


def _name_skipped(name: str, skipped: int, problems: Sequence[str]) -> None:
    """Prints the first of the documents that were skipped, in the order of their files."""
    print(f"{skipped:,} bad documents of {name} are skipped:", file=sys.stderr)
    for problem in problems[:MAX_PROBLEMS]:
        print(f"  {problem}", file=sys.stderr)
    if skipped > MAX_PROBLEMS:
        print(f"  and {skipped - MAX_PROBLEMS:,} more", file=sys.stderr)


def _too_little_text(job: Job, part: str, documents: int) -> UserError:
    if len(job.parts) > 1 and documents == 1:
        return UserError(f"{job.source.name} {ONE_DOCUMENT}")
    problem = f"{job.source.name}: the {part} part has too little text for one row"
    if len(job.parts) > 1 and part == "validation":
        return UserError(
            f"{problem} of data.sequence_length={job.sequence_length}, so nothing is held out: raise "
            "data.validation_fraction, or add text"
        )
    return UserError(
        f"{problem} of data.sequence_length={job.sequence_length}: choose a smaller length or another split"
    )


@contextlib.contextmanager
def _progress_bar(
    job: Job, blocks: Sequence[Block], budget: int, options: PrepareOptions
) -> Iterator[Callable[[Progress], None]]:
    """A progress bar with tokens/s and the remaining time: over the token budget, else over the source."""
    tokens, size = sum(b.parts[0]["tokens"] for b in blocks), sum(b.size for b in blocks)
    unit, total, initial = (" tokens", budget, tokens) if budget else (job.source.unit, job.source.size, size)
    new_tokens = 0
    with tqdm(
        total=total,
        initial=initial,
        desc="+".join(job.parts),
        unit=unit,
        unit_scale=unit != " documents",
        smoothing=0,
        dynamic_ncols=True,
        disable=not options.progress,
    ) as bar:

        def advance(message: Progress) -> None:
            nonlocal new_tokens
            new_tokens += message.tokens
            elapsed_s = bar.format_dict["elapsed"] if options.progress else 0
            bar.set_postfix_str(f"{new_tokens / elapsed_s:,.0f} tokens/s" if elapsed_s else "", refresh=False)
            bar.update(message.tokens if budget else message.size)

        yield advance
