"""transformers' words for a model: its config.json, and the names and shapes of its tensors, both ways.

`LlamaForCausalLM` is what model/llama.py computes, its kernels [out, in] and layer by layer; the halves of
its rotary heads are ours. What its config can say and model/llama.py cannot compute is refused by name.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from relora_jax import shapes
from relora_jax.config import ModelConfig
from relora_jax.errors import UserError
from relora_jax.model import rope
from relora_jax.model.llama import check_heads
from relora_jax.model.rope import Scaling
from relora_jax.training import names

ARCHITECTURE, MODEL_TYPE = "LlamaForCausalLM", "llama"
MODULES = {"attention": "self_attn", "mlp": "mlp"}  # of a block
MOST = {"num_hidden_layers": 10_000}  # more is no model, and would be counted one by one
_ORIGINAL = "original_max_position_embeddings"
# What transformers takes where config.json is silent (of special ids as well), and what alone can be
# represented here.
_DEFAULTS: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02}
SPECIAL: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
# The scalings by transformers' names, their numbers by ours; and what it takes where one is missing.
_SCALINGS = {"default": rope.Unscaled} | {kind: s for kind, s in rope.CHOICES.items() if kind != "none"}
_SCALING_DEFAULTS = {"beta_fast": (32.0,), "beta_slow": (1.0,)}


class Place(NamedTuple):
    """Where a tensor of `shape` (the file's) belongs: a variable's path, its index on the stacked axis."""

    path: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool  # whether ours is the transpose of the file's


def tensors(model: ModelConfig) -> dict[str, Place]:
    """The tensors of the model by their names there, in the order of transformers."""
    hidden, sizes = model.hidden, shapes.kernels(model)
    found = {"model.embed_tokens.weight": Place(names.EMBEDDING, None, (model.vocab_size, hidden), False)}
    for layer in range(model.layers):
        block = f"model.layers.{layer}"
        for group, kernels in shapes.KERNELS.items():
            for name in kernels:
                path, (fan_in, fan_out) = names.kernel_of(names.LAYERS[name]), sizes[name]
                place = Place(path, layer, (fan_out, fan_in), True)
                found[f"{block}.{MODULES[group]}.{name}_proj.weight"] = place
        for norm, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            found[f"{block}.{norm}.weight"] = Place(names.norm(ours), layer, (hidden,), False)
    found["model.norm.weight"] = Place(names.FINAL_NORM, None, (hidden,), False)
    if not model.tied_embeddings:
        found["lm_head.weight"] = Place(names.HEAD, None, (model.vocab_size, hidden), True)
    return found


def to_config(model: ModelConfig, *, length: int, dtype: str, special: dict[str, Any]) -> dict[str, Any]:
    """config.json of the model; `length` where it does not say how far its positions reach.

    `special`: what SPECIAL names. UserError where transformers cannot hold the model.
    """
    if model.hidden % model.heads:
        raise UserError(
            f"model.hidden {model.hidden} is no multiple of model.heads {model.heads}, "
            f"and {ARCHITECTURE} asks for it: the model cannot be exported"
        )
    scaling = rope.parse(model.rope_scaling)
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_positions or length,
        "rms_norm_eps": model.rms_eps,
        "initializer_range": model.init_std,
        "rope_theta": model.rope_theta,  # the two as all versions of transformers read them
        "rope_scaling": _written(scaling, model.max_positions or length),
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
        **special,
    }


def from_config(facts: Any, *, where: Any) -> ModelConfig:
    """The model that a config.json describes, to be computed in float32. UserError for what it cannot be."""
    if not isinstance(facts, dict):
        raise UserError(f"{where} is no JSON object: it is no config of a model")
    kind, named = facts.get("model_type"), facts.get("architectures") or [ARCHITECTURE]
    if kind != MODEL_TYPE or named != [ARCHITECTURE]:
        said = (
            kind if kind != MODEL_TYPE else ", ".join(map(str, named)) if isinstance(named, list) else named
        )
        raise UserError(f"{where} is of a {said!r}: only {MODEL_TYPE} ({ARCHITECTURE}) can be imported")
    for key, allowed in _ONLY.items():
        if key in facts and facts[key] not in allowed:
            raise UserError(
                f"{where} has {key} = {facts[key]!r}, and only {allowed[0]!r} can be represented here"
            )
    whole = lambda key, *default: _whole(facts, key, *default, where=where)  # noqa: E731
    hidden, heads, positions = whole("hidden_size"), whole("num_attention_heads"), None
    positions = whole("max_position_embeddings", _DEFAULTS["max_position_embeddings"])
    theta, scaling = _rope(facts, positions, where)
    tied = facts.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{where}: tie_word_embeddings = {tied!r} must be true or false")
    model = ModelConfig(
        vocab_size=whole("vocab_size"),
        hidden=hidden,
        mlp=whole("intermediate_size"),
        layers=whole("num_hidden_layers"),
        heads=heads,
        kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", max(hidden // heads, 1)),
        compute_dtype="float32",
        tied_embeddings=tied,
        rope_theta=theta,
        rope_scaling=str(scaling),
        max_positions=positions,
        rms_eps=_number(facts, "rms_norm_eps", _DEFAULTS["rms_norm_eps"], where=where),
        init_std=_number(facts, "initializer_range", _DEFAULTS["initializer_range"], where=where),
    )
    try:
        check_heads(model.heads, model.kv_heads, model.head_dim)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    return model


def special_ids(facts: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Those of SPECIAL that are ids of the model; eos may be a list of them."""

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < model.vocab_size

    found: dict[str, Any] = {key: facts.get(key) for key in SPECIAL}
    if isinstance(found["eos_token_id"], list):
        ends = [i for i in found.pop("eos_token_id") if is_id(i)]
        return special_ids(found, model) | ({"eos_token_id": ends} if ends else {})
    return {key: value for key, value in found.items() if is_id(value)}


def _rope(facts: dict[str, Any], positions: int, where: Any) -> tuple[float, Scaling]:
    """(theta, scaling): under `rope_parameters`, as transformers 5 writes them, or as those before did.

    Where both are there, the older name is what every version takes.
    """
    written = facts.get("rope_scaling") or facts.get("rope_parameters") or {}
    if not isinstance(written, dict) or any(isinstance(value, dict) for value in written.values()):
        raise UserError(f"{where}: its rope settings are no JSON object, or one for each kind of layer")
    theta = _number(written | ({} if "rope_theta" in written else facts), "rope_theta", 1e4, where=where)
    kind = written.get("rope_type", written.get("type", "default"))
    if written.get("partial_rotary_factor") not in (None, 1.0) or written.get("truncate", True) is not True:
        raise UserError(f"{where}: rope {kind} with partial_rotary_factor or truncate cannot be represented")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UserError(f"{where} has rope {kind!r}: one of {', '.join(_SCALINGS)} can be imported")
    scaling = _SCALINGS[kind]
    number = lambda key, *default: _number(written, key, *default, where=f"{where}, rope {kind}")  # noqa: E731

    def value(name: str) -> float:
        if name == "attention_factor":
            return _attention(written, number)
        if name != _ORIGINAL:
            return number(name, *_SCALING_DEFAULTS.get(name, ()))
        if scaling is rope.Dynamic:  # which has one number for both
            return float(positions)
        return _number(facts, _ORIGINAL, number(_ORIGINAL, positions), where=where)

    try:
        return theta, scaling(*(value(field.name) for field in dataclasses.fields(scaling)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _attention(there: dict[str, Any], number: Any) -> float:
    """yarn's factor on cos and sin: given, or 0.1 log(factor) + 1 with its weights `mscale`."""
    if there.get("attention_factor") is not None:
        return number("attention_factor")
    log = math.log(max(number("factor"), 1.0))
    if there.get("mscale") and there.get("mscale_all_dim"):
        return (0.1 * number("mscale") * log + 1) / (0.1 * number("mscale_all_dim") * log + 1)
    return 0.1 * log + 1


def _written(scaling: Scaling, positions: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if isinstance(scaling, rope.Unscaled):
        return None
    written = {"rope_type": scaling.kind, **dataclasses.asdict(scaling)}
    if isinstance(scaling, rope.Dynamic) and written.pop(_ORIGINAL) != positions:
        raise UserError(
            f"rope scaling {scaling} is meant for other positions than model.max_positions {positions}, "
            "and transformers has one number for both: set that one"
        )
    if _ORIGINAL in written:
        written[_ORIGINAL] = int(written[_ORIGINAL])
    return written


def _whole(facts: dict[str, Any], key: str, *default: int, where: Any) -> int:
    """A whole number from 1 on; an absent one, or null, is its default."""
    value, most = facts.get(key), MOST.get(key, 2**31 - 1)
    value = default[0] if value is None and default else value
    if type(value) is not int or not 1 <= value <= most:
        raise UserError(f"{where}: {key} = {value!r} must be a whole number from 1 to {most:,}")
    return value


def _number(facts: dict[str, Any], key: str, *default: float, where: Any) -> float:
    """A finite number above 0; an absent one, or null, is its default."""
    value = facts.get(key)
    value = default[0] if value is None and default else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        raise UserError(f"{where}: {key} = {value!r} must be a number above 0")
    return float(value)
