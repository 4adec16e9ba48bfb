"""What a config's `data` names -> its tokenizer and the rows of both parts, found or made.

Nothing here needs JAX: rows are made on machines without devices, in many processes.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from relora_jax.config import Config, DataConfig
from relora_jax.data import file_source, tfds_source
from relora_jax.data.packing import PACKINGS
from relora_jax.data.rows import FORMAT, RowStore
from relora_jax.data.shards import Job
from relora_jax.data.source import BLOCK_DOCUMENTS, Source
from relora_jax.data.stores import ONE_DOCUMENT, How, check_size, row_stores, versions_made
from relora_jax.errors import UserError
from relora_jax.tokenizer import tokenizer as tokenizers
from relora_jax.tokenizer.tokenizer import Tokenizer

TEXT = ("dataset", "split", "text", "text_field", "validation_fraction")  # of a key: which text it is


class Prepared(NamedTuple):
    """What a run reads."""

    tokenizer: Tokenizer
    train: RowStore
    validation: RowStore


class _Text(NamedTuple):
    """Which text (its part of a store's key), which parts one reading of it gives, and how to open it."""

    key: dict[str, Any]
    parts: tuple[str, ...]
    open: Callable[[], Source]


def prepare(data: DataConfig, how: How = How()) -> Prepared:  # noqa: B008
    """Tokenizer and rows of both parts, found or made.

    UserError where something is to be made of text above `how.build_limit_bytes` (on disk).
    """
    found = _texts(data)
    tokenizer = _tokenizer(data, found[-1], how)
    stores = {part: store for each in found for part, store in _stores(data, each, tokenizer, how).items()}
    return Prepared(tokenizer, stores["train"], stores["validation"])


def find_tokenizer(data: DataConfig, how: How = How()) -> Tokenizer:  # noqa: B008
    """The tokenizer alone, found or made: what it shows wrong shows before hours of rows."""
    return _tokenizer(data, _texts(data)[-1], how)


def tokenizer_of(data: DataConfig, rows: dict[str, Any]) -> Tokenizer:
    """The tokenizer of rows with the key `rows`, whose sha256 is the caller's to compare.

    The text is opened only where a tokenizer that was trained on it is no longer in the cache. UserError
    where that is another text now.
    """
    told = {name: rows[name] for name in TEXT if name in rows}
    ids = {f"{name}_id": rows[name] for name in ("eos", "pad", "bos") if name in rows}
    data = dataclasses.replace(data, dataset=told.get("dataset", data.dataset), **ids)

    lost = f"the tokenizer {data.tokenizer} is no longer in the cache, and the text that it was trained on"
    remedy = "bring either back, or give the tokenizer's file as --tokenizer=PATH"

    def source() -> Source:
        try:
            now = _named(data)[-1]
            opened = now.open()
        except UserError as error:
            raise UserError(f"{lost} is not there ({error}): {remedy}") from error
        if now.key != told:
            raise UserError(f"{lost} is another now: {remedy}")
        return opened

    return _tokenizer(data, _Text(told, (), source), How())


def _tokenizer(data: DataConfig, train: _Text, how: How) -> Tokenizer:
    def documents() -> Iterable[str]:
        source = train.open()
        check_size(source, {**train.key, **_packing(data)}, how)
        return source.train_texts()

    ids = {"eos_id": data.eos_id, "pad_id": data.pad_id, "bos_id": data.bos_id}
    key = json.dumps(train.key, sort_keys=True)
    return tokenizers.find(data.tokenizer, documents, key=key, **ids)


def check_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """UserError where the model has fewer ids than rows can hold: special pieces may lie beyond them."""
    highest, vocabulary = tokenizer.highest, config.model.vocab_size
    if highest < vocabulary:
        return
    remedy = f"set it to {tokenizer.vocab_size}"
    if config.train.init_from:  # which has the vocabulary that it has
        remedy = "take that of train.init_from as data.tokenizer, and as data.pad_id an id that the model has"
    raise UserError(
        f"the tokenizer has {tokenizer.vocab_size} pieces and model.vocab_size is {vocabulary}: {remedy}"
    )


def check_rows(config: Config, train: RowStore) -> None:
    """UserError where the rows are fewer than one update reads."""
    if train.rows < config.train.batch:
        raise UserError(
            f"the train split has {train.rows} rows of data.sequence_length {config.data.sequence_length}, "
            f"fewer than one train.batch of {config.train.batch}: "
            "take more text, shorter rows or a smaller batch"
        )


def train_texts(data: DataConfig) -> Iterator[str]:
    """The documents of the train part, in order."""
    return _named(data)[-1].open().train_texts()


def _texts(data: DataConfig) -> list[_Text]:
    """What rows are made of, the train part last; UserError where no part of it could be held out."""
    found = _named(data)
    if data.text and not data.validation_text and (source := found[-1].open()).documents == 1:
        raise UserError(f"{source.name} {ONE_DOCUMENT}")
    return found


def _named(data: DataConfig) -> list[_Text]:
    """What `data` names, the train part last."""
    check(data)
    return _own_text(data) if data.text else _dataset(data)


def rows_of_split(data: DataConfig, split: str, tokenizer: Tokenizer, how: How) -> RowStore:
    """The rows of any split of the dataset, packed as those of the run."""
    return _stores(data, _split(data, "validation", split), tokenizer, how)["validation"]


def _dataset(data: DataConfig) -> list[_Text]:
    """A split each, the smaller one first: a wrong name shows before hours of work."""
    return [_split(data, "validation", data.validation_split), _split(data, "train", data.train_split)]


def _split(data: DataConfig, part: str, split: str) -> _Text:
    version = dataset_version(data)
    return _Text(
        {"dataset": version, "split": split}, (part,), lambda: tfds_source.open_dataset(version, split)
    )


def dataset_version(data: DataConfig) -> str:
    """name:version of what data.dataset names, which rows may know where the dataset is gone."""
    return tfds_source.dataset_version(data.dataset, versions_made)


def _own_text(data: DataConfig) -> list[_Text]:
    field, fraction = data.text_field, 0.0 if data.validation_text else data.validation_fraction
    train = file_source.find(data.text, field=field, validation_fraction=fraction)
    if not data.validation_text:
        return [_files(train, file_source.PARTS)]
    named = {"field": field, "validation_fraction": fraction, "setting": "data.validation_text"}
    validation = file_source.find(data.validation_text, **named)
    if both := sorted({*train.paths} & {*validation.paths}):
        raise UserError(f"{both[0]} is in data.text and in data.validation_text: leave it out of one of them")
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


def _stores(data: DataConfig, found: _Text, tokenizer: Tokenizer, how: How) -> dict[str, RowStore]:
    key = {
        **found.key,
        **_packing(data),
        **tokenizer.key,
        "train_tokens": data.train_tokens if "train" in found.parts else 0,
    }

    def job(folder: Path) -> Job:
        source = found.open()
        check_size(source, key, how)
        return Job(
            folder=folder,
            parts=found.parts,
            source=source,
            tokenizer=tokenizer,
            packing=data.packing,
            sequence_length=data.sequence_length,
            one_thread=how.workers > 1,
        )

    return dict(zip(found.parts, row_stores(key, found.parts, job, how), strict=True))


def check(data: DataConfig) -> None:
    """UserError for a setting of `data` that no rows can be made of."""
    if data.packing not in PACKINGS:
        raise UserError(f"data.packing {data.packing!r} is not known: one of {', '.join(PACKINGS)}")
    if data.sequence_length < 1:
        raise UserError(f"data.sequence_length {data.sequence_length} must be at least 1")
    if data.train_tokens < 0:
        raise UserError(f"data.train_tokens {data.train_tokens} must be at least 0, which is no end")
    if data.text and not data.validation_text and not 0 < data.validation_fraction < 1:
        raise UserError(f"data.validation_fraction {data.validation_fraction} must lie in (0, 1)")
    if data.validation_text and not data.text:
        raise UserError(f"data.validation_text {data.validation_text!r} goes with data.text, which is empty")
    if not (data.text or data.dataset):
        raise UserError("there is nothing to read: set data.text to files of your own, or data.dataset")
