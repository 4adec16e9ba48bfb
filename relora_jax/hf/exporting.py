"""A run's checkpoint -> the directory of a LlamaForCausalLM, with its tokenizer and settings."""

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

from relora_jax.checkpoint.restore import open_saved
from relora_jax.checkpoint.saved import DamagedError, checkpoints_dir
from relora_jax.checkpoint.variables import Variables
from relora_jax.config import Config
from relora_jax.errors import UserError
from relora_jax.hf import llama, tensor_files, tokenizer_files
from relora_jax.hf.llama import Place
from relora_jax.run import record, restored
from relora_jax.storage import atomic
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training import names

DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}
ADAPTER = "adapter"  # the folder of the live factors
OURS = ("config.json", "generation_config.json", "model*.safetensors*", f"{ADAPTER}/adapter_*")
OURS += tokenizer_files.FILES


class Exported(NamedTuple):
    """What was written: the update of its checkpoint, and whether that has live factors."""

    update: int
    low_rank: bool


def export(
    workdir: Path,
    output: Path,
    *,
    update: int | None,
    dtype: str,
    adapter: bool,
    tokenizer: str,
    overwrite: bool,
) -> Exported:
    """Writes the newest checkpoint of the run, or that of `update`, as a directory that transformers loads.

    `tokenizer`: where the run's own lies now ("": where it was). UserError for what cannot be exported,
    before anything is written.
    """
    atomic.check_output(output, OURS, overwrite=overwrite)
    if checkpoints_dir(workdir).resolve() in (output.resolve(), *output.resolve().parents):
        raise UserError(f"--output={output} lies among the checkpoints of the run: name another place")
    config = restored.settings_of(workdir)
    u = restored.update_of(workdir, update)
    own = find_tokenizer(workdir, config, tokenizer)
    try:
        variables = Variables(open_saved(workdir, u, config))
        if adapter and not variables.low_rank:
            raise UserError(
                f"the checkpoint of {workdir} at {u} has no live factors: export it without --adapter"
            )
        settings = _settings(config, own, record.read_facts(workdir), dtype=dtype)  # may refuse
        with atomic.directory(output, OURS, overwrite=overwrite) as aside:
            write(variables, config, aside, dtype=DTYPES[dtype], adapter=adapter)
            for name, content in settings.items():
                atomic.write(aside / name, content)
            if adapter:
                write_adapter(variables, config, aside / ADAPTER, dtype=DTYPES[dtype], base=output)
    except DamagedError as error:
        restored.check_kept(workdir, u)
        raise UserError(f"{error}: export another checkpoint, by --update") from error
    return Exported(u, variables.low_rank)


def find_tokenizer(workdir: Path, config: Config, lies_at: str) -> Tokenizer | None:
    """The run's own; None, with a warning, for a model that was imported without one."""
    facts = record.read_facts(workdir)
    if "imported_from" in facts and not (facts.get("rows") or lies_at):
        print(
            f"warning: {workdir} was imported without a tokenizer, and is exported without one",
            file=sys.stderr,
        )
        return None
    return restored.tokenizer_of(workdir, config, lies_at)


def write(variables: Variables, config: Config, folder: Path, *, dtype: np.dtype, adapter: bool) -> None:
    """The model's tensors, a file of them in memory at a time; with `adapter` without the live factors."""
    places = llama.tensors(config.model)
    name_of = {(place.path, place.layer): name for name, place in places.items()}
    sizes: dict[str, int] = {}
    for place in places.values():
        sizes[place.path] = sizes.get(place.path, 0) + math.prod(place.shape) * dtype.itemsize
    with tqdm(total=len(sizes), unit=" variables", leave=False, disable=None) as bar:

        def tensors(paths: list[str]) -> dict[str, np.ndarray]:
            found = {}
            for path in paths:
                for layer, array in _parts(variables, path, merged=not adapter):
                    name = name_of[path, layer]
                    found[name] = _as_transformers(array, places[name], dtype)
                bar.update()
            return found

        tensor_files.save(folder, [partial(tensors, paths) for paths in tensor_files.grouped(sizes)])


def write_adapter(variables: Variables, config: Config, folder: Path, *, dtype: np.dtype, base: Path) -> None:
    """The live factors, as `peft.PeftModel.from_pretrained(model, folder)` loads them."""
    relora, places = config.relora, llama.tensors(config.model)
    places = {name: place for name, place in places.items() if variables.has_factors(place.path)}

    def tensors() -> dict[str, np.ndarray]:
        factors = {path: variables.factors(path) for path in {place.path for place in places.values()}}
        return {
            tensor: np.ascontiguousarray(factor[place.layer].T.astype(dtype))
            for name, place in places.items()
            for tensor, factor in zip(_adapter_names(name), factors[place.path], strict=True)
        }

    folder.mkdir()
    tensor_files.save(folder, [tensors], stem="adapter_model")
    facts = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": relora.rank,
        "lora_alpha": int(relora.alpha) if relora.alpha == int(relora.alpha) else relora.alpha,
        "lora_dropout": relora.dropout,
        "target_modules": sorted({name.split(".")[-2] for name in places}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "inference_mode": True,
    }
    atomic.write(folder / "adapter_config.json", _json(facts))


def _settings(
    config: Config, tokenizer: Tokenizer | None, told: dict[str, Any], *, dtype: str
) -> dict[str, bytes]:
    """{name: content} beside the tensors; `told`: run.json. UserError where transformers cannot hold it."""
    length = config.model.max_positions or config.data.sequence_length
    special, pad = special_ids(config, tokenizer, told.get("special", {}))
    facts = llama.to_config(config.model, length=length, dtype=dtype, special=special)
    files = {"config.json": _json(facts), "generation_config.json": _json(special | pad)}
    return files | (_tokenizer_files(tokenizer, length) if tokenizer else {})


def _tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """With a warning where it has no fast form: weights are not kept back for it."""
    try:
        files = tokenizer_files.files(tokenizer, length=length)
        if note := tokenizer_files.note(tokenizer):
            print(f"note: {note}", file=sys.stderr)
        return files
    except tokenizer_files.NoFastFormError as error:
        print(f"warning: {error}", file=sys.stderr)
        return tokenizer_files.as_it_is(tokenizer)


def special_ids(
    config: Config, tokenizer: Tokenizer | None, imported: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(special ids of config.json, the pad that generation alone has): the tokenizer's, else the model's.

    transformers gives the embedding of config.json's pad no gradients: one that is eos is left out there.
    """
    own = {f"{name}_token_id": getattr(tokenizer, name, None) for name in ("bos", "eos", "pad")}
    own = llama.special_ids(own, config.model)
    pad = {"pad_token_id": own.pop("pad_token_id")} if "pad_token_id" in own else {}
    found = dict.fromkeys(llama.SPECIAL) | llama.special_ids(imported, config.model) | own
    if tokenizer and tokenizer.pad != tokenizer.eos:
        found |= pad
    return found, {} if found["pad_token_id"] is not None else pad


def _parts(variables: Variables, path: str, *, merged: bool) -> Iterator[tuple[int | None, np.ndarray]]:
    """(layer, its array) of a variable that is stacked, or (None, the whole)."""
    if not names.is_stacked(path):
        yield None, variables[path]
    else:
        yield from enumerate(variables.merged_layers(path) if merged else variables[path])


def _as_transformers(array: np.ndarray, place: Place, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray((array.T if place.transposed else array).astype(dtype))


def _adapter_names(name: str) -> tuple[str, str]:
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()
