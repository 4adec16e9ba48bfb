"""Exports a run's checkpoint as the directory of a model of transformers, with its tokenizer."""

import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_dtypes import bfloat16
from tqdm import tqdm

from relora_jax.checkpoint.restore import open_checkpoint
from relora_jax.checkpoint.saved import DamagedError, checkpoints_dir
from relora_jax.checkpoint.variables import Variables
from relora_jax.config import Config
from relora_jax.errors import UserError
from relora_jax.hf import llama, tensor_files, tokenizer_files
from relora_jax.run import record, restored
from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath, is_remote
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training import names

DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}
ADAPTER = "adapter"  # the directory of the live factors
BASE_NAME = ".."  # of an adapter: the directory above it
OUTPUT_FILES = ("config.json", "generation_config.json", "model*.safetensors*", f"{ADAPTER}/adapter_*")
OUTPUT_FILES += tokenizer_files.FILES


class Exported(NamedTuple):
    """The exported checkpoint: its update, and whether it has live factors."""

    update: int
    low_rank: bool


def export(
    workdir: AnyPath,
    output: Path,
    *,
    update: int | None,
    dtype: str,
    adapter: bool,
    base_name: str,
    tokenizer: str,
    overwrite: bool,
) -> Exported:
    """Exports the run's newest checkpoint, or that of `update`, to a directory that transformers loads.

    `tokenizer`: the path of the run's tokenizer if it was moved, else "". `base_name`: what the adapter names
    as its base model. UserError, before anything is written, if the run cannot be exported.
    """
    if base_name != BASE_NAME and not adapter:
        raise UserError(f"--base_name={base_name} names the base of an adapter: add --adapter")
    atomic.check_output(output, OUTPUT_FILES, overwrite=overwrite)
    checkpoints = checkpoints_dir(workdir)
    if not is_remote(checkpoints) and checkpoints.resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"--output={output} is inside the run's checkpoints: choose another path")
    config = restored.settings_of(workdir)
    u = restored.update_of(workdir, update)
    own = find_tokenizer(workdir, config, tokenizer)
    try:
        variables = Variables(open_checkpoint(workdir, u, config))
        if adapter and not variables.low_rank:
            raise UserError(f"checkpoint {u} of {workdir} has no live factors: export it without --adapter")
        files = _config_files(config, own, record.read_facts(workdir), dtype=dtype)
        with atomic.directory(output, OUTPUT_FILES, overwrite=overwrite) as staging:
            write(variables, config, staging, dtype=DTYPES[dtype], adapter=adapter)
            for name, content in files.items():
                (staging / name).parent.mkdir(exist_ok=True)
                atomic.write(staging / name, content)
            if adapter:
                write_adapter(variables, config, staging / ADAPTER, dtype=DTYPES[dtype], base_name=base_name)
    except DamagedError as error:
        restored.check_not_deleted(workdir, u)
        raise UserError(f"{error}: export another checkpoint with --update") from error
    return Exported(u, variables.low_rank)


def find_tokenizer(workdir: AnyPath, config: Config, path: str) -> Tokenizer | None:
    """The run's tokenizer; None, with a warning, if the run was imported without one."""
    facts = record.read_facts(workdir)
    if "imported_from" in facts and not (facts.get("rows") or path):
        print(
            f"warning: {workdir} was imported without a tokenizer, and is exported without one",
            file=sys.stderr,
        )
        return None
    return restored.tokenizer_of(workdir, config, path)


def write(variables: Variables, config: Config, folder: Path, *, dtype: np.dtype, adapter: bool) -> None:
    """Writes the model's tensors, one file in memory at a time; with `adapter` without the live factors."""
    specs = llama.tensor_specs(config.model)
    name_of = {(spec.path, spec.layer): name for name, spec in specs.items()}
    sizes: dict[str, int] = {}
    for spec in specs.values():
        sizes[spec.path] = sizes.get(spec.path, 0) + math.prod(spec.shape) * dtype.itemsize
    with tqdm(total=len(sizes), unit=" variables", leave=False, disable=None) as bar:

        def shard(paths: list[str]) -> dict[str, np.ndarray]:
            tensors = {}
            for path in paths:
                for layer, array in _layers(variables, path, merged=not adapter):
                    name = name_of[path, layer]
                    array = array.T if specs[name].transposed else array
                    tensors[name] = np.ascontiguousarray(array.astype(dtype))
                bar.update()
            return tensors

        tensor_files.save(folder, [partial(shard, paths) for paths in tensor_files.group_by_size(sizes)])


def write_adapter(
    variables: Variables, config: Config, folder: Path, *, dtype: np.dtype, base_name: str
) -> None:
    """Writes the live factors, as `peft.PeftModel.from_pretrained(model, folder)` loads them."""
    relora, specs = config.relora, llama.tensor_specs(config.model)
    specs = {name: spec for name, spec in specs.items() if variables.has_factors(spec.path)}

    def tensors() -> dict[str, np.ndarray]:
        factors = {path: variables.factors(path) for path in {spec.path for spec in specs.values()}}
        return {
            f"base_model.model.{name.removesuffix('weight')}{peft_name}.weight": np.ascontiguousarray(
                factor[spec.layer].T.astype(dtype)
            )
            for name, spec in specs.items()
            for peft_name, factor in zip(("lora_A", "lora_B"), factors[spec.path], strict=True)
        }

    folder.mkdir()
    tensor_files.save(folder, [tensors], stem="adapter_model")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": relora.rank,
        "lora_alpha": int(relora.alpha) if relora.alpha == int(relora.alpha) else relora.alpha,
        "lora_dropout": relora.dropout,
        "target_modules": sorted({name.split(".")[-2] for name in specs}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    atomic.write(folder / "adapter_config.json", _json(settings))


def _config_files(
    config: Config, tokenizer: Tokenizer | None, facts: dict[str, Any], *, dtype: str
) -> dict[str, bytes]:
    """{name: content} of all files but the tensors; `facts`: run.json. UserError as `llama.to_config`."""
    length = config.model.max_positions or config.data.sequence_length
    special, pad = special_ids(config, tokenizer, facts.get("special", {}))
    settings = llama.to_config(config.model, length=length, dtype=dtype, special=special)
    files = {"config.json": _json(settings), "generation_config.json": _json(special | pad)}
    return files | (_tokenizer_files(tokenizer, length) if tokenizer else {})


def _tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """{name: content}; a tokenizer without a fast form is a warning: the weights are still exported."""
    try:
        files = tokenizer_files.files(tokenizer, length=length)
        if note := tokenizer_files.note(tokenizer):
            print(f"note: {note}", file=sys.stderr)
        return files
    except tokenizer_files.NoFastFormError as error:
        print(f"warning: {error}", file=sys.stderr)
        return tokenizer_files.unconverted(tokenizer)


def special_ids(
    config: Config, tokenizer: Tokenizer | None, imported: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(special ids of config.json, extra pad of generation_config.json), from the tokenizer, else `imported`.

    Several imported eos ids, as of a chat model, are kept next to the run's own.
    transformers does not train the embedding of config.json's pad, so a pad that equals eos is not in it.
    """
    own = {f"{name}_token_id": getattr(tokenizer, name, None) for name in ("bos", "eos", "pad")}
    own = llama.special_ids(own, config.model)
    pad = {"pad_token_id": own.pop("pad_token_id")} if "pad_token_id" in own else {}
    ids = dict.fromkeys(llama.SPECIAL) | llama.special_ids(imported, config.model)
    several = ids["eos_token_id"] if isinstance(ids["eos_token_id"], list) else []
    ids |= own
    if several and ids["eos_token_id"] not in (several, *several):
        several = [ids["eos_token_id"], *several]
    ids["eos_token_id"] = several or ids["eos_token_id"]
    if tokenizer and tokenizer.pad != tokenizer.eos:
        ids |= pad
    return ids, {} if ids["pad_token_id"] is not None else pad


def _layers(variables: Variables, path: str, *, merged: bool) -> Iterator[tuple[int | None, np.ndarray]]:
    """(layer, array) of a stacked variable, or (None, array) of another."""
    if not names.is_stacked(path):
        yield None, variables[path]
    else:
        yield from enumerate(variables.merged_layers(path) if merged else variables[path])


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
