"""A run's checkpoint -> a directory that transformers loads: LlamaForCausalLM, its tokenizer, its settings.

    python -m relora_jax.export --workdir=RUN --output=DIR [--update=U] [--dtype=bfloat16] [--adapter]
                                [--tokenizer=PATH] [--overwrite]

The newest checkpoint, or that of --update, of any arm, its live factors merged. --dtype: float32 (default),
as the run keeps its weights, or bfloat16, rounded to nearest. --adapter: the base kernels without the live
factors, and these beside them in DIR/adapter, in PEFT's format. --tokenizer: where the run's own lies now,
if it was moved. DIR is written aside and takes its name when it is whole; --overwrite replaces an older
export. A SentencePiece model that no tokenizer.json gives the same ids goes out as it is, with a warning.
Exit codes: 0 done, 2 wrong usage, 74 data or disk failed.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_dtypes import bfloat16
from tqdm import tqdm

from relora_jax import disk, fast_tokenizer, flags, llama_hf, restored, run
from relora_jax.checkpoint import directory, open_saved
from relora_jax.config import Config
from relora_jax.llama_hf import Place
from relora_jax.saved import DamagedError
from relora_jax.tensor_files import Kind, Writer
from relora_jax.tokenizer import Tokenizer
from relora_jax.weights import Weights

DTYPES: dict[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(bfloat16)}
ADAPTER = "adapter"  # the folder of the live factors
OURS = ("config.json", "generation_config.json", "model*.safetensors*", f"{ADAPTER}/adapter_*")
OURS += fast_tokenizer.FILES


def main(argv: Sequence[str]) -> int:
    """Exports what the command line names and says where it lies; the exit code."""
    words = _parse(argv[1:])
    jax.config.update("jax_platforms", "cpu")  # all is done on the host, and accelerators may be at work
    place, output = words.workdir.expanduser(), words.output.expanduser().absolute()
    disk.check_output(output, OURS, overwrite=words.overwrite)
    if directory(place).resolve() in (output.resolve(), *output.resolve().parents):
        raise ValueError(f"--output={output} lies among the checkpoints of the run: name another place")
    config = run.read_config(place)
    u = restored.update_of(place, words.update)
    tokenizer = find_tokenizer(place, config, words.tokenizer)
    try:
        weights = Weights(open_saved(place, u, config))
        if words.adapter and not weights.low_rank:
            raise ValueError(
                f"the checkpoint of {place} at {u} has no live factors: export it without --adapter"
            )
        facts = run.read_facts(place)
        settings = _settings(config, tokenizer, facts, dtype=words.dtype)  # may refuse, before the tensors
        with disk.directory(output, OURS, overwrite=words.overwrite) as aside:
            write(weights, config, aside, dtype=DTYPES[words.dtype], adapter=words.adapter)
            for name, content in settings.items():
                disk.write(aside / name, content)
            if words.adapter:
                write_adapter(weights, config, aside / ADAPTER, dtype=DTYPES[words.dtype], base=output)
    except DamagedError as error:
        restored.check_kept(place, u)
        raise ValueError(f"{error}: export another checkpoint, by --update") from error
    what = "its live factors beside it" if words.adapter else "its live factors merged"
    what = what if weights.low_rank else "full-rank"
    print(f"update {u} of {place}, {what}, in {words.dtype}: {output}")
    return 0


def find_tokenizer(place: Path, config: Config, lies_at: str) -> Tokenizer | None:
    """The run's own; None, with a warning, for a model that was imported without one."""
    facts = run.read_facts(place)
    if "imported_from" in facts and not (facts.get("rows") or lies_at):
        print(
            f"warning: {place} was imported without a tokenizer, and is exported without one", file=sys.stderr
        )
        return None
    return restored.tokenizer_of(place, config, lies_at)


def write(weights: Weights, config: Config, folder: Path, *, dtype: np.dtype, adapter: bool) -> None:
    """The model's tensors, one variable in memory at a time; with `adapter` without the live factors."""
    places = llama_hf.tensors(config.model)
    names = {(place.path, place.layer): name for name, place in places.items()}
    paths = list(dict.fromkeys(place.path for place in places.values()))
    with Writer(folder, {name: (place.shape, dtype) for name, place in places.items()}) as writer:
        for path in tqdm(paths, unit=" variables", leave=False, disable=None):
            for layer, array in _parts(weights, path, merged=not adapter):
                name = names[path, layer]
                writer.write(name, _as_there(array, places[name], dtype))


def write_adapter(weights: Weights, config: Config, folder: Path, *, dtype: np.dtype, base: Path) -> None:
    """The live factors, as `peft.PeftModel.from_pretrained(model, folder)` loads them."""
    relora, places = config.relora, llama_hf.tensors(config.model)
    places = {name: place for name, place in places.items() if weights.has_factors(place.path)}
    kinds: dict[str, Kind] = {}
    for name, place in places.items():
        fan_out, fan_in = place.shape
        a, b = _adapter_names(name)
        kinds |= {a: ((relora.rank, fan_in), dtype), b: ((fan_out, relora.rank), dtype)}
    folder.mkdir()
    with Writer(folder, kinds, stem="adapter_model", shard_bytes=math.inf) as writer:
        for path in dict.fromkeys(place.path for place in places.values()):
            factors = weights.factors(path)
            for name, layer in [(name, place.layer) for name, place in places.items() if place.path == path]:
                for tensor, factor in zip(_adapter_names(name), factors, strict=True):
                    writer.write(tensor, np.ascontiguousarray(factor[layer].T.astype(dtype)))
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
    disk.write(folder / "adapter_config.json", _json(facts))


def _settings(
    config: Config, tokenizer: Tokenizer | None, told: dict[str, Any], *, dtype: str
) -> dict[str, bytes]:
    """{name: content} beside the tensors; `told`: run.json. ValueError where transformers cannot hold it."""
    length = config.model.max_positions or config.data.sequence_length
    special, pad = special_ids(config, tokenizer, told.get("special", {}))
    facts = llama_hf.to_config(config.model, length=length, dtype=dtype, special=special)
    files = {"config.json": _json(facts), "generation_config.json": _json(special | pad)}
    return files | (_tokenizer_files(tokenizer, length) if tokenizer else {})


def _tokenizer_files(tokenizer: Tokenizer, length: int) -> dict[str, bytes]:
    """With a warning where it has no fast form: weights are not kept back for it."""
    try:
        return fast_tokenizer.files(tokenizer, length=length)
    except fast_tokenizer.NoFastFormError as error:
        print(f"warning: {error}", file=sys.stderr)
        return fast_tokenizer.as_it_is(tokenizer)


def special_ids(
    config: Config, tokenizer: Tokenizer | None, imported: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(special ids of config.json, the pad that generation alone has): the tokenizer's, else the model's.

    transformers gives the embedding of config.json's pad no gradients: one that is eos is left out there.
    """
    own = {f"{name}_token_id": getattr(tokenizer, name, None) for name in ("bos", "eos", "pad")}
    own = llama_hf.special_ids(own, config.model)
    pad = {"pad_token_id": own.pop("pad_token_id")} if "pad_token_id" in own else {}
    found = dict.fromkeys(llama_hf.SPECIAL) | llama_hf.special_ids(imported, config.model) | own
    if tokenizer and tokenizer.pad != tokenizer.eos:
        found |= pad
    return found, {} if found["pad_token_id"] is not None else pad


def _parts(weights: Weights, path: str, *, merged: bool) -> Iterator[tuple[int | None, np.ndarray]]:
    """(layer, its array) of a variable that is stacked, or (None, the whole)."""
    if not path.startswith("blocks/"):
        yield None, weights.variable(path)
    else:
        yield from enumerate(weights.merged_layers(path) if merged else weights.variable(path))


def _as_there(array: np.ndarray, place: Place, dtype: np.dtype) -> np.ndarray:
    return np.ascontiguousarray((array.T if place.transposed else array).astype(dtype))


def _adapter_names(name: str) -> tuple[str, str]:
    module = f"base_model.model.{name.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _json(facts: dict[str, Any]) -> bytes:
    return (json.dumps(facts, indent=2) + "\n").encode()


def _parse(words: Sequence[str]) -> Any:
    parser = flags.Words()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--update", type=int)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    flags.main(main, __doc__)
