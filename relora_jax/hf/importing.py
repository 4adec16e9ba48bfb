"""Imports a model of transformers as a run whose full-rank checkpoint train.init_from starts from."""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.saved import checkpoints_dir
from relora_jax.config import Config, ModelConfig
from relora_jax.errors import UserError
from relora_jax.families import FAMILIES
from relora_jax.hf import json_file, llama, sentencepiece_folder, starting_config, tokenizer_files
from relora_jax.hf.llama import TensorSpec
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

MAX_CONFIG_BYTES = 2**20
STARTING_CONFIG = "config.py"
TOKENIZER_FILES = (
    *tokenizers.FILES,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("vocab.json", "merges.txt", *tokenizer_files.TEMPLATES),
)
OUTPUT_FILES = ("checkpoints/*", record.CONFIG, STARTING_CONFIG, record.FACTS, f"{TOKENIZER}/*")
HEAD = "lm_head.weight"
_MAX_LISTED = 5  # tensors in an error message


def import_model(source: Path, workdir: Path, *, overwrite: bool) -> ModelConfig:
    """Writes the model in `source` to `workdir`, an absolute path, as a run with a starting config.

    UserError, with nothing left behind, if it cannot be imported.
    """
    if ":" in str(workdir):
        raise UserError(f"--output={workdir} has a colon, which ends FILE in --config=FILE:ARM: rename it")
    checkpoints_dir(workdir)  # refuses a path that they cannot be read from
    atomic.check_output(workdir, OUTPUT_FILES, overwrite=overwrite)
    model, files, tokenizer = load(source)
    with atomic.directory(workdir, OUTPUT_FILES, overwrite=overwrite) as staging:
        writer = Writer(staging)
        keys = tokenizer.key if tokenizer else {}  # a run that starts from this one must have the same
        ids = {f"{name}_id": keys[name] for name in ("eos", "pad", "bos") if name in keys}
        facts = {"imported_from": str(source.absolute()), "compute_dtype": _compute_dtype(files)}
        writer.write(STARTING_CONFIG, starting_config.text(model, workdir, source=facts["imported_from"]))
        config = starting_config.of_model(model, str(workdir), "full", compute_dtype="float32", ids=ids)
        train = dataclasses.replace(config.train, init_from="")
        config = dataclasses.replace(config, model=model, train=train)
        validate(config, devices=1)
        rows = {"train": keys} if keys else {}
        settings = json_file.read(source / "config.json", max_bytes=MAX_CONFIG_BYTES)
        defaults = FAMILIES[model.family].defaults
        special = llama.special_ids(defaults | settings | _generation_eos(source, settings), model)
        directory.begin(writer, config, rows=rows, special=special, **facts)
        _copy_tokenizer(source, staging / TOKENIZER)
        with Checkpoints(staging, config) as checkpoints:
            checkpoints.save(0, state_of(config, files))
    return model


def load(source: Path) -> tuple[ModelConfig, TensorFiles, Tokenizer | None]:
    """The model in a directory. UserError if it cannot be imported; reads no tensor but a tied head."""
    config = source / "config.json"
    if not config.is_file():
        raise UserError(f"{str(source)!r} has no config.json: pass a directory written by transformers")
    model = llama.from_config(json_file.read(config, max_bytes=MAX_CONFIG_BYTES), source=config)
    tied_head = (HEAD,) if model.tied_embeddings else ()
    files = TensorFiles.open(source, ignored=_is_computed, optional=tied_head)
    check_tensors(model, files)
    check_rope(model, config)
    tokenizer = find_tokenizer(source)
    return model, files, tokenizer and fit_tokenizer(tokenizer, model.vocab_size)


def check_tensors(model: ModelConfig, files: TensorFiles) -> None:
    """UserError if tensors are missing, unexpected or of another shape, or a tied head differs."""
    specs, kinds = llama.tensor_specs(model), files.kinds
    _refuse(files, "missing", [name for name in specs if name not in kinds])
    unexpected = [name for name in kinds if name not in specs]
    if HEAD in unexpected:
        embeddings = next(iter(specs))
        if kinds[HEAD] != kinds[embeddings] or not _same_bits(files.read(HEAD), files.read(embeddings)):
            raise UserError(
                f"{files.folder}: config.json ties the head to the embeddings, but {HEAD} differs from "
                f"{embeddings}: set tie_word_embeddings to false"
            )
        unexpected.remove(HEAD)
    _refuse(files, "unexpected", unexpected)
    for name, spec in specs.items():
        if kinds[name][0] != spec.shape:
            raise UserError(
                f"{files.folder}: config.json does not match the tensors: {name!r} has shape "
                f"{list(kinds[name][0])}, expected {list(spec.shape)}"
            )


def _is_computed(name: str) -> bool:
    """Whether a tensor is a buffer that older versions of transformers saved, and all ignore at any depth."""
    return "rotary_emb.inv_freq" in name


def _refuse(files: TensorFiles, problem: str, names: list[str]) -> None:
    if names:
        listed = ", ".join(map(repr, names[:_MAX_LISTED]))
        more = f" and {len(names) - _MAX_LISTED:,} more" if len(names) > _MAX_LISTED else ""
        raise UserError(f"{files.folder}: config.json does not match the tensors: {problem} {listed}{more}")


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Equality in which NaN equals itself."""
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


def check_rope(model: ModelConfig, config: Path) -> None:
    """UserError if rope settings that are valid one by one give frequencies that are not finite."""
    scaling = rope.parse(model.rope_scaling)
    options = {"theta": model.rope_theta, "length": model.max_positions}
    try:
        with np.errstate(all="ignore"):
            finite = np.isfinite(scaling.frequencies(model.head_dim, **options)).all()
    except (ArithmeticError, ValueError):
        finite = False
    if not finite:
        raise UserError(
            f"{config}: rope_theta {model.rope_theta} and {model.rope_scaling} give no finite frequencies"
        )


def find_tokenizer(source: Path) -> Tokenizer | None:
    """The model's tokenizer; None, with a warning, if there is none or it has no eos."""
    path = next((source / name for name in tokenizers.FILES if (source / name).is_file()), None)
    if path is None:
        _warn(f"{source} has no tokenizer ({', '.join(tokenizers.FILES)}): set data.tokenizer to train it")
        return None
    if not (converted := sentencepiece_folder.files(path)):
        tokenizer = _load_tokenizer(path)
        _warn_without_bos(tokenizer, path)
        return tokenizer
    if note := sentencepiece_folder.note(path, converted[tokenizers.FILE]):
        _warn(note)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "generation_config.json"):
            (Path(folder) / name).symlink_to((source / name).absolute())
        for name, content in converted.items():
            (Path(folder) / name).write_bytes(content)
        tokenizer = _load_tokenizer(Path(folder) / tokenizers.FILE)
    _warn_without_bos(tokenizer, path)
    return tokenizer and dataclasses.replace(tokenizer, path=path)


def _warn_without_bos(tokenizer: Tokenizer | None, path: Path) -> None:
    """A warning if a SentencePiece model has a bos that transformers does not put before texts."""
    if tokenizer and tokenizer.bos is None and path.suffix == ".model":
        bos = tokenizers.load(path, eos_id=0).model.bos
        if bos is not None:
            _warn(
                f"{path} has a bos, {bos}, which transformers puts before no text, nor a run before a "
                'document: if the model was trained with it, set "add_bos_token": true in '
                "tokenizer_config.json, and import again"
            )


def _load_tokenizer(path: Path) -> Tokenizer | None:
    bos_id = _bos_id(path)
    try:
        tokenizer = tokenizers.load(path, bos_id=bos_id)
    except UserError:
        tokenizers.load(path, eos_id=0, bos_id=bos_id)  # raises if more than eos is missing
        _warn(f"{path} has no eos to end documents with: set data.eos_id to train it")
        return None
    try:
        tokenizer_files.check(tokenizer)
    except tokenizer_files.NoFastFormError as error:  # warn before training rather than at export
        _warn(str(error))
    return tokenizer


def _bos_id(path: Path) -> int:
    """The id that documents start with, as transformers' texts do; -1 if they start with none, or several."""
    before = tokenizers.prefix(path)
    bos_id = before[0] if len(set(before)) == 1 else -1
    if len(before) > 1:
        documents = "documents start with one" if bos_id >= 0 else "documents start with none of them"
        _warn(
            f"the template in {path} adds {len(before)} ids before a text ({', '.join(map(str, before))}), "
            f"{documents}: edit its post_processor, and import it again, if that is not what you want"
        )
    return bos_id


def fit_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> Tokenizer:
    """The tokenizer; with eos as its pad, and a warning, if the model has no embedding for the pad.

    UserError if the model has none for eos, bos or an id of a text. Rows have no other special tokens.
    """
    fitting, path = tokenizer, tokenizer.path
    if tokenizer.pad >= vocab_size:
        fitting = dataclasses.replace(tokenizer, pad=tokenizer.eos)
    if fitting.highest >= vocab_size:
        raise UserError(
            f"{path} has the id {fitting.highest} ({tokenizer.model.piece(fitting.highest)!r}), but the "
            f"model has {vocab_size:,} embeddings: remove it from the file, or add some in transformers "
            f"(model.resize_token_embeddings({tokenizer.vocab_size})), save the model, and import that"
        )
    if fitting is not tokenizer:
        name = tokenizer.model.piece(tokenizer.pad)
        _warn(f"{path} has the pad {name!r} with id {tokenizer.pad}, which the model lacks: using eos as pad")
    return fitting


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _compute_dtype(files: TensorFiles) -> str:
    """bfloat16 if all tensors have 16 bits, else float32."""
    return "float32" if any(kind == np.float32 for _, kind in files.kinds.values()) else "bfloat16"


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer's files; with a tokenizer.json, if transformers makes one of them."""
    path = next((source / name for name in tokenizers.FILES if (source / name).is_file()), None)
    if path is None:
        return
    files = {name: source / name for name in TOKENIZER_FILES if (source / name).is_file()}
    files |= {str(file.relative_to(source)): file for file in source.glob(tokenizer_files.MORE_TEMPLATES)}
    converted = sentencepiece_folder.files(path)
    for name in sentencepiece_folder.CONVERTED if converted else ():
        files.pop(name, None)
    for name, file in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, folder / name)  # follows links
    for name, content in converted.items():
        (folder / name).write_bytes(content)


def _generation_eos(source: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """All eos ids of config.json and generation_config.json: a chat's answers have several ends."""
    path = source / "generation_config.json"
    files = (settings, json_file.read(path, max_bytes=MAX_CONFIG_BYTES) if path.is_file() else {})
    values = [each.get("eos_token_id") for each in files if isinstance(each, dict)]
    eos = [i for value in values for i in (value if isinstance(value, list) else [value]) if type(i) is int]
    return {"eos_token_id": list(dict.fromkeys(eos))} if eos else {}


def _check_finite(folder: Path, name: str, tensor: np.ndarray) -> None:
    """UserError if a weight is NaN or infinite: no update and no loss would be finite."""
    finite = np.isfinite(tensor)
    if not finite.all():
        count = np.count_nonzero(~finite)
        first = [int(i) for i in np.unravel_index(np.argmin(finite), tensor.shape)]
        raise UserError(
            f"{folder}: {count:,} of the {tensor.size:,} weights of {name!r} are NaN or infinite, the first "
            f"at {first}: download the file again, or save a model whose weights are finite"
        )


def state_of(config: Config, files: TensorFiles) -> TrainState:
    """The full-rank state with the model alone, loaded leaf by leaf."""
    like = model_of(abstract_state(config, 0))
    tensors: dict[str, list[tuple[str, TensorSpec]]] = {}
    for name, spec in llama.tensor_specs(config.model).items():
        tensors.setdefault(names.trained(spec.path), []).append((name, spec))
    with tqdm(total=sum(map(len, tensors.values())), desc="import", unit=" tensors", disable=None) as bar:

        def leaf(path: str, shape: Any) -> jax.Array:
            values = np.empty(shape.shape, shape.dtype)
            for name, spec in tensors[path]:
                tensor = files.read(name)
                _check_finite(files.folder, name, tensor)
                target = values if spec.layer is None else values[spec.layer]
                target[...] = tensor.T if spec.transposed else tensor
                bar.update()
            return jax.device_put(values)

        return unflatten({path: leaf(path, shape) for path, shape in flatten(like).items()}, like)
