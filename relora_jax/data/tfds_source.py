"""Documents of a TFDS dataset, read with random access and without TensorFlow.

A dataset is named name[/config][:version], such as "c4/en:3.1.0". Without a version, the newest one in
TFDS's directory is used, or else the one that rows in the cache were built from. Datasets are located by
their directories, not by TFDS's builder code, so nothing is ever downloaded. "sotu" is built on first use.
"""

import errno
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from relora_jax.data import rows, sotu
from relora_jax.data.source import BLOCK_DOCUMENTS, CHUNK_DOCUMENTS, BadDocumentError, Chunk, Stripe
from relora_jax.errors import UserError
from relora_jax.storage import places

_NAME = re.compile(r"(\w+(?:/\w[\w.+=-]*)*)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Documents:
    """A Source of one split's texts: documents[i], or documents[i:j] as a list in one read.

    `version` is the dataset's name with its version ("sotu:1.0.0"), `bytes` the size of all its splits on
    disk, `counts` the number of documents from each of its files.
    """

    unit = " documents"

    def __init__(
        self,
        source: Any,
        *,
        version: str,
        split: str,
        bytes: int,
        counts: Sequence[int],
        skip_bad_documents: bool = False,
    ) -> None:
        self._source, self._split, self._counts = source, split, list(counts)
        self.version, self.bytes, self.skip_bad_documents = version, bytes, skip_bad_documents

    def __reduce__(self) -> tuple[Callable[..., "Documents"], tuple[str, str, bool]]:
        # another process opens its own
        return open_dataset, (self.version, self._split, self.skip_bad_documents)

    @property
    def name(self) -> str:
        """Name with version and split."""
        return f"{self.version} {self._split}"

    @property
    def files(self) -> int:
        """Number of files in the split."""
        return len(self._counts)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self)

    @property
    def size(self) -> int:
        """Number of documents, for progress."""
        return len(self)

    def stripes(self, workers: int) -> list[Stripe]:
        """One stripe per block, as access is random."""
        return [
            Stripe(file, block, blocks)
            for file, blocks in enumerate(-(-count // BLOCK_DOCUMENTS) for count in self._counts)
            for block in range(blocks)
        ]

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """The blocks of a file; a block is read when its chunks are consumed."""
        start = sum(self._counts[:file])
        for first in range(start, start + self._counts[file], BLOCK_DOCUMENTS):
            yield self._chunks(first, min(first + BLOCK_DOCUMENTS, start + self._counts[file]))

    def train_texts(self) -> Iterator[str]:
        """All documents, in order."""
        return iter(self)

    def part(self, text: str) -> int:
        """0: a split is a single part."""
        return 0

    def _chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Bad documents keep their places: blocks are found by numbers of documents."""
        for first in range(start, stop, CHUNK_DOCUMENTS):
            indices = range(first, min(first + CHUNK_DOCUMENTS, stop))
            texts, skipped = list[str](), list[str]()
            for index, text in zip(indices, self._examples(indices), strict=True):
                try:
                    texts.append(self._text(index, text))
                except BadDocumentError as error:
                    if not self.skip_bad_documents:
                        raise
                    skipped.append(error.problem)
            yield Chunk(texts, len(indices), skipped)

    def __len__(self) -> int:
        return len(self._source)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return self._read(range(len(self))[index])
        return self._read([range(len(self))[index]])[0]  # the range raises IndexError past the end

    def __iter__(self) -> Iterator[str]:
        for chunk in self._chunks(0, len(self)):
            yield from chunk.texts

    def _read(self, indices: Sequence[int]) -> list[str]:
        return [self._text(i, text) for i, text in zip(indices, self._examples(indices), strict=True)]

    def _examples(self, indices: Sequence[int]) -> list[bytes]:
        try:
            return [example["text"] for example in self._source.__getitems__(list(indices))]
        except RuntimeError as error:  # a truncated or missing shard
            raise _unreadable(self.name, error) from error

    def _text(self, index: int, text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = f"document {index} of {self.name} is not UTF-8 ({error.reason} at byte {error.start})"
            raise BadDocumentError(problem, "build the dataset again") from error


def dataset_version(dataset: str, cached: Callable[[str], Iterable[str]] = lambda name: ()) -> str:
    """name:version of `dataset`; an explicit version is not checked.

    If TFDS's directory has no version, it is that of cached(name), the versions that rows were built from.
    UserError if there is none, or more than one.
    """
    name, version = _parse(dataset)
    return f"{name}:{version or _newest(name, cached)}"


def open_dataset(dataset: str, split: str, skip_bad_documents: bool = False) -> Documents:
    """The documents of a split ("train", or a slice: "train[:1%]"), in the dataset's own order.

    UserError, now or during reads, if something is wrong with the dataset; OSError if files cannot be
    opened: each stays open once read.
    """
    version = dataset_version(dataset)
    name, number = version.split(":")
    path = places.datasets_dir() / name / number
    if version == f"{sotu.NAME}:{sotu.VERSION}":
        sotu.build()
    if not (path / "dataset_info.json").is_file():
        raise _missing(name, number)
    import tensorflow_datasets as tfds  # takes half a second: only if documents are read

    try:
        builder: Any = tfds.builder_from_directory(path)
    except Exception as error:  # its type depends on which file is damaged
        raise _unreadable(version, error) from error
    _check_features(version, builder.info.features)
    _check_format(version, path, builder.info)
    try:
        counts = [part.take for part in builder.info.splits[split].file_instructions]
        rows.allow_open_files(len(counts))
        source = builder.as_data_source(split)
        if len(source) != sum(counts):  # a slice of negative length
            raise ValueError
    except ValueError as error:
        splits = ", ".join(builder.info.splits)
        raise UserError(f"{version} has no split {split!r}: choose {splits}, or a slice of one") from error
    size = sum(file.stat().st_size for file in path.iterdir())
    return Documents(
        source,
        version=version,
        split=split,
        bytes=size,
        counts=counts,
        skip_bad_documents=skip_bad_documents,
    )


def _parse(dataset: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(dataset)
    if match is None:
        raise UserError(f"dataset {dataset!r} is invalid: write name, name/config or name/config:1.2.3")
    return match[1], match[2]


def _versions(path: Path) -> list[str]:
    """Complete versions in `path`, oldest first; TFDS renames a dataset once it is complete."""
    names = [file.parent.name for file in path.glob("*/dataset_info.json")]
    return _sorted(name for name in names if _VERSION.fullmatch(name))


def _sorted(versions: Iterable[str]) -> list[str]:
    return sorted(versions, key=lambda name: [int(number) for number in name.split(".")])


def _newest(name: str, cached: Callable[[str], Iterable[str]]) -> str:
    if versions := _versions(places.datasets_dir() / name):
        return versions[-1]
    if name == sotu.NAME:
        return sotu.VERSION
    match _sorted(cached(name)):
        case []:
            raise _missing(name, None)
        case [version]:
            return version
        case versions:
            raise UserError(
                f"dataset {name} is not in {places.datasets_dir()}, but rows of several versions exist "
                f"({', '.join(versions)}): set data.dataset={name}:{versions[-1]}, or another of these"
            )


def _missing(name: str, version: str | None) -> UserError:
    root = places.datasets_dir()
    folders = sorted(entry for entry in (root / name).glob("*") if entry.is_dir())
    dataset = name if version is None else f"{name}:{version}"
    if versions := _versions(root / name):
        return UserError(f"{root} has {name} in {', '.join(versions)}, not {version}: use one of these")
    if configs := [entry.name for entry in folders if _versions(entry)]:
        return UserError(
            f"dataset {dataset} in {root} has configs {', '.join(configs)}: write {name}/{configs[0]}"
        )
    return UserError(
        f"dataset {dataset} is not in {root}: set TFDS_DATA_DIR to the directory that holds {name}/<version>"
    )


def _unreadable(name: str, error: Exception) -> UserError | OSError:
    reason = str(error).partition("\n")[0]
    if (too_many := os.strerror(errno.EMFILE)) in reason:
        return OSError(errno.EMFILE, too_many, name)
    return UserError(f"{name} in {places.datasets_dir()} cannot be read ({reason}): build or copy it again")


def _check_features(version: str, features: Any) -> None:
    """UserError unless the dataset has the feature `text`, one string per document."""
    import tensorflow_datasets as tfds

    by_name = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not isinstance(by_name.get("text"), tfds.features.Text):
        names = ", ".join(sorted(by_name)) or type(features).__name__
        raise UserError(f"{version} has no feature `text` of plain text: its features are {names}")


def _check_format(version: str, path: Path, info: Any) -> None:
    """UserError unless it is ArrayRecord, which allows random access without TensorFlow."""
    formats = sorted(format.value for format in info.available_file_formats())
    if "array_record" not in formats:
        raise UserError(
            f"{version} is stored in {path} as {', '.join(formats)}: convert it, with TensorFlow, by "
            f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )
