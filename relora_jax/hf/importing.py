"""A LLaMA of transformers -> a run whose full-rank checkpoint train.init_from begins with."""

import dataclasses
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.config import Config, ModelConfig
from relora_jax.errors import UserError
from relora_jax.hf import json_file, llama, starting_config, tokenizer_files
from relora_jax.hf.llama import Place
from relora_jax.hf.tensor_files import TensorFiles
from relora_jax.model import rope
from relora_jax.run import directory, record
from relora_jax.run.restored import TOKENIZER
from relora_jax.storage import atomic
from relora_jax.storage.writer import Writer
from relora_jax.tokenizer import tokenizer as tokenizers
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training import names
from relora_jax.training.program import abstract_state
from relora_jax.training.state import TrainState, flatten, model_of, unflatten
from relora_jax.validate import validate

CONFIG_BYTES = 2**20
STARTING_CONFIG = "config.py"
TOKENIZER_FILES = (
    *tokenizers.FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
OURS = ("checkpoints/*", record.CONFIG, STARTING_CONFIG, record.FACTS, f"{TOKENIZER}/*")
HEAD = "lm_head.weight"
# Buffers that older versions of transformers kept among the tensors: they follow from config.json.
_COMPUTED = re.compile(r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq")
_NAMED = 5  # of many tensors that are missing, or too many


def import_model(source: Path, workdir: Path, *, overwrite: bool) -> ModelConfig:
    """Turns the model in `source` into a run in `workdir`, an absolute path, with a config to begin with.

    UserError for what cannot be imported, before anything is written.
    """
    if ":" in str(workdir):
        raise UserError(f"--output={workdir} has a colon, which ends a name in --config=FILE:ARM: rename it")
    atomic.check_output(workdir, OURS, overwrite=overwrite)
    model, files, tokenizer = judge(source)
    with atomic.directory(workdir, OURS, overwrite=overwrite) as aside:
        writer = Writer(aside)
        keys = tokenizer.key if tokenizer else {}  # another run that begins here must have the same
        ids = {f"{name}_id": keys[name] for name in ("eos", "pad", "bos") if name in keys}
        facts = {"imported_from": str(source.absolute()), "compute_dtype": _compute_dtype(files)}
        writer.write(STARTING_CONFIG, starting_config.text(model, workdir, source=facts["imported_from"]))
        config = starting_config.of_model(model, str(workdir), "full", compute_dtype="float32", ids=ids)
        config = _as_run(model, config)
        validate(config, devices=1)
        rows = {"train": keys} if keys else {}
        settings = json_file.read(source / "config.json", most_bytes=CONFIG_BYTES)
        special = llama.special_ids(llama.SPECIAL | settings, model)
        directory.begin(writer, config, rows=rows, special=special, **facts)
        _copy_tokenizer(source, aside / TOKENIZER)
        with Checkpoints(aside, config) as checkpoints:
            checkpoints.save(0, state_of(config, files))
    return model


def judge(source: Path) -> tuple[ModelConfig, TensorFiles, Tokenizer | None]:
    """What the directory holds. UserError for what cannot be imported; no tensor is read but a tied head."""
    config = source / "config.json"
    if not config.is_file():
        raise UserError(f"{str(source)!r} has no config.json: name a directory that transformers wrote")
    model = llama.from_config(json_file.read(config, most_bytes=CONFIG_BYTES), where=config)
    files = TensorFiles.open(source)
    check_tensors(model, files)
    check_angles(model, config)
    tokenizer = find_tokenizer(source)
    return model, files, tokenizer and within(tokenizer, model.vocab_size)


def check_tensors(model: ModelConfig, files: TensorFiles) -> None:
    """UserError for tensors that are missing, too many, of another shape, or of a head that is not tied."""
    places, kinds = llama.tensors(model), files.kinds
    _none(files, "is missing", [name for name in places if name not in kinds])
    surplus = [name for name in kinds if name not in places and not _COMPUTED.fullmatch(name)]
    if HEAD in surplus:
        embeddings = next(iter(places))
        if kinds[HEAD] != kinds[embeddings] or not _same(files.read(HEAD), files.read(embeddings)):
            raise UserError(
                f"{files.folder}: config.json ties the head to the embeddings, and {HEAD} differs from "
                f"{embeddings}: set tie_word_embeddings to false"
            )
        surplus.remove(HEAD)
    _none(files, "has no place in the model", surplus)
    for name, at in places.items():
        if kinds[name][0] != at.shape:
            raise UserError(
                f"{files.folder}: its config.json disagrees with its tensors: {name!r} has the shape "
                f"{list(kinds[name][0])}, where {list(at.shape)} is due"
            )


def _none(files: TensorFiles, what: str, names: list[str]) -> None:
    if names:
        listed = ", ".join(map(repr, names[:_NAMED]))
        more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
        raise UserError(f"{files.folder}: its config.json disagrees with its tensors: {listed}{more} {what}")


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit by bit: NaN is NaN."""
    return np.array_equal(one.view(np.uint8), other.view(np.uint8))


def check_angles(model: ModelConfig, config: Path) -> None:
    """UserError for rotary positions whose numbers, each allowed, come to nothing together."""
    scaling = rope.parse(model.rope_scaling)
    how = {"theta": model.rope_theta, "length": model.max_positions}
    try:
        with np.errstate(all="ignore"):
            whole = np.isfinite(scaling.frequencies(model.head_dim, **how)).all()
    except (ArithmeticError, ValueError):
        whole = False
    if not whole:
        raise UserError(f"{config}: rope_theta {model.rope_theta} and {model.rope_scaling} give no angles")


def find_tokenizer(source: Path) -> Tokenizer | None:
    """The model's own; None, with a warning, where there is none that ends documents."""
    path = next((source / name for name in tokenizers.FILES if (source / name).is_file()), None)
    if path is None:
        _warn(f"{source} has no tokenizer ({', '.join(tokenizers.FILES)}): give one as data.tokenizer")
        return None
    bos = tokenizers.begins(path)
    bos_id = -1 if bos is None else bos
    try:
        found = tokenizers.load(path, bos_id=bos_id)
    except UserError:
        tokenizers.load(path, eos_id=0, bos_id=bos_id)  # raises where it is more than a missing eos
        _warn(f"{path} has no eos to end documents with: give its id as data.eos_id")
        return None
    try:
        tokenizer_files.check(found)
    except tokenizer_files.NoFastFormError as error:  # said before anything is trained
        _warn(str(error))
    return found


def within(tokenizer: Tokenizer, vocabulary: int) -> Tokenizer:
    """The tokenizer with eos as its pad, told in a line, where the pad lies beyond the model's ids.

    UserError where an id of a text, or eos or bos, does. Other special tokens may: rows never hold them.
    """
    fitting, path = tokenizer, tokenizer.path
    if tokenizer.pad >= vocabulary:
        fitting = dataclasses.replace(tokenizer, pad=tokenizer.eos)
    if fitting.highest >= vocabulary:
        raise UserError(
            f"{path} gives the id {fitting.highest} ({tokenizer.model.name(fitting.highest)!r}), and the "
            f"model knows {vocabulary:,}: take it out of the file, or give it a row in transformers "
            f"(model.resize_token_embeddings({tokenizer.vocab_size})), save the model, and import that"
        )
    if fitting is not tokenizer:
        name = tokenizer.model.name(tokenizer.pad)
        _warn(
            f"the pad of {path}, {name!r}, is the id {tokenizer.pad}, which the model lacks: eos is the pad"
        )
    return fitting


def _warn(what: str) -> None:
    print(f"warning: {what}", file=sys.stderr)


def _compute_dtype(files: TensorFiles) -> str:
    """float32, or bfloat16 where all tensors are of 16 bits."""
    wide = any(kind == np.float32 for name, (_, kind) in files.kinds.items() if not _COMPUTED.fullmatch(name))
    return "float32" if wide else "bfloat16"


def _as_run(model: ModelConfig, config: Config) -> Config:
    """The config of RUN itself: full-rank, computed in float32, and begun with nothing else."""
    train = dataclasses.replace(config.train, init_from="")
    return dataclasses.replace(config, model=model, train=train)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    there = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if set(there) & set(tokenizers.FILES):
        folder.mkdir()
        for name in there:
            shutil.copyfile(source / name, folder / name)  # what a link leads to


def state_of(config: Config, files: TensorFiles) -> TrainState:
    """The full-rank state with nothing in it but the model, one leaf after another."""
    like = model_of(abstract_state(config, 0))
    parts: dict[str, list[tuple[str, Place]]] = {}
    for name, place in llama.tensors(config.model).items():
        parts.setdefault(names.trained(place.path), []).append((name, place))
    with tqdm(total=sum(map(len, parts.values())), desc="import", unit=" tensors", disable=None) as bar:

        def leaf(path: str, shape: Any) -> jax.Array:
            values = np.empty(shape.shape, shape.dtype)
            for name, place in parts[path]:
                tensor = files.read(name)
                part = values if place.layer is None else values[place.layer]
                part[...] = tensor.T if place.transposed else tensor
                bar.update()
            return jax.device_put(values)

        return unflatten({path: leaf(path, shape) for path, shape in flatten(like).items()}, like)
