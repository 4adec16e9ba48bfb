"""Documents of a TFDS dataset, read at random places without TensorFlow.

A dataset is written name[/config][:version], such as "c4/en:3.1.0"; without a version the newest one
that lies in TFDS's directory is read; where none does, rows may still tell which it was.
Datasets are found by their directories, not by TFDS's code for them, so nothing is ever fetched. "sotu" is
built on first use.
"""

import errno
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from relora_jax.data import rows, sotu
from relora_jax.data.source import BLOCK_DOCUMENTS, CHUNK_DOCUMENTS, Chunk, Stripe
from relora_jax.errors import UserError
from relora_jax.storage import places

_NAME = re.compile(r"(\w+(?:/\w[\w.+=-]*)*)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Documents:
    """The texts of one split; documents[i], or documents[i:j] as a list by one read; a source of blocks.

    `version` is the dataset's name with its version ("sotu:1.0.0"), `bytes` the size of all its
    splits on disk, `takes` how many documents come from each of its files.
    """

    unit = " documents"

    def __init__(self, source: Any, *, version: str, split: str, bytes: int, takes: Sequence[int]) -> None:
        self._source, self._split, self._takes = source, split, list(takes)
        self.version, self.bytes = version, bytes

    def __reduce__(self) -> tuple[Callable[[str, str], "Documents"], tuple[str, str]]:
        return open_dataset, (self.version, self._split)  # another process opens it anew

    @property
    def name(self) -> str:
        """Version and split."""
        return f"{self.version} {self._split}"

    @property
    def files(self) -> int:
        """How many files the split lies in."""
        return len(self._takes)

    @property
    def documents(self) -> int:
        """How many there are."""
        return len(self)

    @property
    def size(self) -> int:
        """In documents."""
        return len(self)

    def stripes(self, workers: int) -> list[Stripe]:
        """Each block by itself: any document is found at once."""
        return [
            Stripe(file, block, count)
            for file, count in enumerate(-(-take // BLOCK_DOCUMENTS) for take in self._takes)
            for block in range(count)
        ]

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """The blocks of a file, each read where it is asked for its chunks."""
        start = sum(self._takes[:file])
        for first in range(start, start + self._takes[file], BLOCK_DOCUMENTS):
            yield self._chunks(first, min(first + BLOCK_DOCUMENTS, start + self._takes[file]))

    def train_texts(self) -> Iterator[str]:
        """All of them, in order."""
        return iter(self)

    def part(self, text: str) -> int:
        """A split is one part."""
        return 0

    def _chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        for first in range(start, stop, CHUNK_DOCUMENTS):
            texts = self[first : min(first + CHUNK_DOCUMENTS, stop)]
            yield Chunk(texts, len(texts))

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
        try:
            examples = self._source.__getitems__(list(indices))
        except RuntimeError as error:  # a shard that is cut or not there
            raise _unreadable(self.name, error) from error
        return [self._text(i, example["text"]) for i, example in zip(indices, examples, strict=True)]

    def _text(self, index: int, text: bytes) -> str:
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            place = f"document {index} of {self.name}"
            raise UserError(f"{place} is not UTF-8 ({error.reason} at byte {error.start})") from error


def dataset_version(dataset: str, made: Callable[[str], Iterable[str]] = lambda name: ()) -> str:
    """name:version of what `dataset` names; a version that is written out is not looked for.

    Where TFDS's directory has no version, it is the one of made(name), those that rows were made of.
    UserError where there is none, or a choice of several.
    """
    name, version = _parse(dataset)
    return f"{name}:{version or _newest(name, made)}"


def open_dataset(dataset: str, split: str) -> Documents:
    """The documents of a split ("train", or a slice: "train[:1%]"), in the dataset's own order.

    UserError, also while they are read, where something is wrong with the dataset, OSError where files
    cannot be opened: each stays open once it was read.
    """
    version = dataset_version(dataset)
    name, number = version.split(":")
    path = places.datasets_dir() / name / number
    if version == f"{sotu.NAME}:{sotu.VERSION}":
        sotu.build()
    if not (path / "dataset_info.json").is_file():
        raise _missing(name, number)
    import tensorflow_datasets as tfds  # half a second: only where documents are read

    try:
        builder: Any = tfds.builder_from_directory(path)
    except Exception as error:  # what it raises depends on which file is damaged
        raise _unreadable(version, error) from error
    _check_features(version, builder.info.features)
    _check_format(version, path, builder.info)
    try:
        takes = [part.take for part in builder.info.splits[split].file_instructions]
        rows.allow_open_files(len(takes))
        source = builder.as_data_source(split)
        if len(source) != sum(takes):  # a slice of negative length fails here
            raise ValueError
    except ValueError as error:
        there = ", ".join(builder.info.splits)
        raise UserError(f"{version} has no split {split!r}: there are {there}, and slices of them") from error
    size = sum(file.stat().st_size for file in path.iterdir())
    return Documents(source, version=version, split=split, bytes=size, takes=takes)


def _parse(dataset: str) -> tuple[str, str | None]:
    match = _NAME.fullmatch(dataset)
    if match is None:
        raise UserError(f"dataset {dataset!r} cannot be read: write name, name/config or name/config:1.2.3")
    return match[1], match[2]


def _versions(path: Path) -> list[str]:
    """Versions that lie whole in `path`, oldest first; TFDS renames a dataset when it is whole."""
    found = [entry.parent.name for entry in path.glob("*/dataset_info.json")]
    return _ordered(name for name in found if _VERSION.fullmatch(name))


def _ordered(versions: Iterable[str]) -> list[str]:
    return sorted(versions, key=lambda name: [int(number) for number in name.split(".")])


def _newest(name: str, made: Callable[[str], Iterable[str]]) -> str:
    if versions := _versions(places.datasets_dir() / name):
        return versions[-1]
    if name == sotu.NAME:
        return sotu.VERSION
    match _ordered(made(name)):
        case []:
            raise _missing(name, None)
        case [version]:
            return version
        case versions:
            raise UserError(
                f"dataset {name} is not in {places.datasets_dir()}, and there are rows of its versions "
                f"{', '.join(versions)}: write data.dataset={name}:{versions[-1]}, or another of these"
            )


def _missing(name: str, version: str | None) -> UserError:
    root = places.datasets_dir()
    folders = sorted(entry for entry in (root / name).glob("*") if entry.is_dir())
    wanted = name if version is None else f"{name}:{version}"
    if versions := _versions(root / name):
        return UserError(f"{root} holds {name} in {', '.join(versions)}, not {version}: name one of these")
    if configs := [entry.name for entry in folders if _versions(entry)]:
        return UserError(
            f"dataset {wanted} lies in {root} as {', '.join(configs)}: write {name}/{configs[0]}"
        )
    return UserError(
        f"dataset {wanted} is not in {root}: set TFDS_DATA_DIR to the directory that holds {name}/<version>"
    )


def _unreadable(what: str, error: Exception) -> UserError | OSError:
    reason = str(error).partition("\n")[0]
    if (too_many := os.strerror(errno.EMFILE)) in reason:
        return OSError(errno.EMFILE, too_many, what)
    return UserError(f"{what} in {places.datasets_dir()} cannot be read ({reason}): build or copy it again")


def _check_features(version: str, features: Any) -> None:
    """`text`, one string a document, is all that is asked of a dataset."""
    import tensorflow_datasets as tfds

    by_name = dict(features.items()) if isinstance(features, tfds.features.FeaturesDict) else {}
    if not isinstance(by_name.get("text"), tfds.features.Text):
        there = ", ".join(sorted(by_name)) or type(features).__name__
        raise UserError(f"{version} has no feature `text` of plain text: its features are {there}")


def _check_format(version: str, path: Path, info: Any) -> None:
    """ArrayRecord is what can be read at random places without TensorFlow."""
    formats = sorted(format.value for format in info.available_file_formats())
    if "array_record" not in formats:
        raise UserError(
            f"{version} lies in {path} as {', '.join(formats)}: convert it, where TensorFlow is, by "
            f"tfds convert_format --dataset_version_dir={path} --out_file_format=array_record"
        )
