"""From a config's `data` to its tokenizer and the rows of both parts, from the cache or built.

Nothing here needs JAX, so rows can be built on machines without accelerators, in many processes.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from relora_jax.config import Config, DataConfig
from relora_jax.data import file_source, tfds_source
from relora_jax.data.packing import PACKINGS
from relora_jax.data.rows import FORMAT, RowStore
from relora_jax.data.shards import Job
from relora_jax.data.source import BLOCK_DOCUMENTS, Source
from relora_jax.data.stores import ONE_DOCUMENT, PrepareOptions, cached_versions, check_size, row_stores
from relora_jax.errors import UserError
from relora_jax.tokenizer import tokenizer as tokenizers
from relora_jax.tokenizer.tokenizer import Tokenizer

# the entries of a store's key that identify the text
TEXT = ("dataset", "split", "text", "text_field", "validation_fraction")


class Prepared(NamedTuple):
    """A run's data: tokenizer and row stores."""

    tokenizer: Tokenizer
    train: RowStore
    validation: RowStore


class _Text(NamedTuple):
    """A text's entries of a store's key, the parts that it provides, and a function that opens it."""

    key: dict[str, Any]
    parts: tuple[str, ...]
    open: Callable[[], Source]


def prepare(data: DataConfig, options: PrepareOptions = PrepareOptions()) -> Prepared:  # noqa: B008
    """Tokenizer and rows of both parts, from the cache or built.

    UserError if anything must be built from text above `options.build_limit_bytes` (on disk).
    """
    texts = _texts(data, options)
    tokenizer = _tokenizer(data, texts[-1], options)
    stores: dict[str, RowStore] = {}
    for text in texts:
        stores |= _stores(data, text, tokenizer, options)
    return Prepared(tokenizer, stores["train"], stores["validation"])


def find_tokenizer(data: DataConfig, options: PrepareOptions = PrepareOptions()) -> Tokenizer:  # noqa: B008
    """Only the tokenizer, from the cache or trained, so that its errors show before hours of work."""
    return _tokenizer(data, _texts(data, options)[-1], options)


def tokenizer_of(data: DataConfig, rows: dict[str, Any]) -> Tokenizer:
    """The tokenizer of rows with the key `rows`; the caller must compare its sha256.

    The text is opened only if a tokenizer that was trained on it is no longer in the cache. UserError if the
    text has changed.
    """
    key = {name: rows[name] for name in TEXT if name in rows}
    ids = {f"{name}_id": rows[name] for name in ("eos", "pad", "bos") if name in rows}
    data = dataclasses.replace(data, dataset=key.get("dataset", data.dataset), **ids)

    problem = f"tokenizer {data.tokenizer} is no longer in the cache, and the text that it was trained on"
    remedy = "restore either one, or pass the tokenizer's file as --tokenizer=PATH"

    def open_text() -> Source:
        try:
            text = _configured_texts(data, PrepareOptions(skip_bad_documents=True))[-1]  # if the run did
            source = text.open()
        except UserError as error:
            raise UserError(f"{problem} is missing ({error}): {remedy}") from error
        if text.key != key:
            raise UserError(f"{problem} has changed: {remedy}")
        return source

    return _tokenizer(data, _Text(key, (), open_text), PrepareOptions())


def _tokenizer(data: DataConfig, train: _Text, options: PrepareOptions) -> Tokenizer:
    def documents() -> Iterable[str]:
        source = train.open()
        check_size(source, {**train.key, **_packing(data)}, options)
        return source.train_texts()

    ids = {"eos_id": data.eos_id, "pad_id": data.pad_id, "bos_id": data.bos_id}
    key = json.dumps(train.key, sort_keys=True)
    return tokenizers.find(data.tokenizer, documents, key=key, **ids)


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """UserError if rows can contain ids outside of the model's vocabulary; unused pieces may be outside."""
    vocab_size = config.model.vocab_size
    if tokenizer.highest < vocab_size:
        return
    remedy = f"set it to {tokenizer.vocab_size}"
    if config.train.init_from:  # whose vocabulary is fixed
        remedy = "set data.tokenizer to that of train.init_from, and data.pad_id below model.vocab_size"
    raise UserError(
        f"the tokenizer has {tokenizer.vocab_size} pieces and model.vocab_size is {vocab_size}: {remedy}"
    )


def check_rows(config: Config, train: RowStore) -> None:
    """UserError if there are fewer rows than one update reads."""
    if train.rows < config.train.batch:
        raise UserError(
            f"the train split has {train.rows} rows of data.sequence_length {config.data.sequence_length}, "
            f"fewer than one train.batch of {config.train.batch}: add text, shorter rows or a smaller batch"
        )


def train_texts(data: DataConfig, options: PrepareOptions = PrepareOptions()) -> Iterator[str]:  # noqa: B008
    """The documents of the train part, in order."""
    return _configured_texts(data, options)[-1].open().train_texts()


def _texts(data: DataConfig, options: PrepareOptions) -> list[_Text]:
    """The texts to build rows from, the train part last; UserError if nothing could be held out."""
    texts = _configured_texts(data, options)
    if data.text and not data.validation_text and (source := texts[-1].open()).documents == 1:
        raise UserError(f"{source.name} {ONE_DOCUMENT}")
    return texts


def _configured_texts(data: DataConfig, options: PrepareOptions) -> list[_Text]:
    """The texts that `data` names, the train part last."""
    check(data)
    return _own_text(data, options) if data.text else _dataset(data, options)


def rows_of_split(data: DataConfig, split: str, tokenizer: Tokenizer, options: PrepareOptions) -> RowStore:
    """The rows of any split of the dataset, packed like the run's."""
    return _stores(data, _split(data, "validation", split, options), tokenizer, options)["validation"]


def _dataset(data: DataConfig, options: PrepareOptions) -> list[_Text]:
    """One text per split, the smaller split first, so that a wrong name shows before hours of work."""
    splits = {"validation": data.validation_split, "train": data.train_split}
    return [_split(data, part, split, options) for part, split in splits.items()]


def _split(data: DataConfig, part: str, split: str, options: PrepareOptions) -> _Text:
    version = dataset_version(data)
    key, skip = {"dataset": version, "split": split}, options.skip_bad_documents
    return _Text(key, (part,), lambda: tfds_source.open_dataset(version, split, skip))


def dataset_version(data: DataConfig) -> str:
    """name:version of data.dataset; cached rows provide the version if the dataset is missing."""
    return tfds_source.dataset_version(data.dataset, cached_versions)


def _own_text(data: DataConfig, options: PrepareOptions) -> list[_Text]:
    find = partial(
        file_source.find,
        field=data.text_field,
        validation_fraction=0.0 if data.validation_text else data.validation_fraction,
        skip_bad_documents=options.skip_bad_documents,
    )
    train = find(data.text)
    if not data.validation_text:
        return [_files(train, file_source.PARTS)]
    validation = find(data.validation_text, setting="data.validation_text")
    resolved = {path.resolve() for path in validation.paths}
    if both := next((path for path in train.paths if path.resolve() in resolved), None):
        raise UserError(f"{both} is in data.text and in data.validation_text: remove it from one of them")
    return [_files(validation, ("validation",)), _files(train, ("train",))]


def _files(files: file_source.Files, parts: tuple[str, ...]) -> _Text:
    facts = {"text_field": files.field, "validation_fraction": files.validation_fraction}
    return _Text({"text": files.fingerprint(), **facts}, parts, lambda: files)


def _packing(data: DataConfig) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "packing": data.packing,
        "sequence_length": data.sequence_length,
        "block_documents": BLOCK_DOCUMENTS,
    }


def _stores(
    data: DataConfig, text: _Text, tokenizer: Tokenizer, options: PrepareOptions
) -> dict[str, RowStore]:
    """{part: its row store} of a text."""
    key = {
        **text.key,
        **_packing(data),
        **tokenizer.key,
        "train_tokens": data.train_tokens if "train" in text.parts else 0,
    }

    def job(folder: Path) -> Job:
        source = text.open()
        check_size(source, key, options)
        if "train" in text.parts:
            for note in tokenizers.control_in_text(tokenizer):
                print(note, file=sys.stderr)
        return Job(
            folder=folder,
            parts=text.parts,
            source=source,
            tokenizer=tokenizer,
            packing=data.packing,
            sequence_length=data.sequence_length,
            one_thread=options.workers > 1,
        )

    return row_stores(key, text.parts, job, options)


def check(data: DataConfig) -> None:
    """UserError for an invalid setting of `data`."""
    if data.packing not in PACKINGS:
        raise UserError(f"data.packing {data.packing!r} is unknown: choose one of {', '.join(PACKINGS)}")
    if data.sequence_length < 1:
        raise UserError(f"data.sequence_length {data.sequence_length} must be at least 1")
    if data.train_tokens < 0:
        raise UserError(f"data.train_tokens {data.train_tokens} must be at least 0 (0: no limit)")
    if data.text and not data.validation_text and not 0 < data.validation_fraction < 1:
        raise UserError(f"data.validation_fraction {data.validation_fraction} must lie in (0, 1)")
    if data.validation_text and not data.text:
        raise UserError(f"data.validation_text {data.validation_text!r} needs data.text, which is empty")
    if not (data.text or data.dataset):
        raise UserError("no training text: set data.text to files of your own, or data.dataset")
