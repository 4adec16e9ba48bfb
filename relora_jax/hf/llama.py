"""LLaMA's families in transformers' terms: config.json, and the names and shapes of the tensors, both ways.

transformers' classes compute what model/llama.py does, with kernels [out, in] per layer and the same layout
of rotary pairs. A config that model/llama.py cannot represent is rejected by the name of its setting.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from relora_jax import shapes
from relora_jax.config import ModelConfig
from relora_jax.errors import UserError
from relora_jax.families import FAMILIES, Family
from relora_jax.model import rope
from relora_jax.model.llama import check_heads
from relora_jax.model.rope import Scaling
from relora_jax.training import names

MODULES = {"attention": "self_attn", "mlp": "mlp"}  # of a block
LIMITS = {"num_hidden_layers": 10_000}  # layers are enumerated
_ORIGINAL = "original_max_position_embeddings"
# transformers' defaults, in all families, for keys that are missing in config.json
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "initializer_range": 0.02}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
}
# {rope_type in transformers: our class}; the fields have the same names
_SCALINGS = {"default": rope.Unscaled} | {kind: s for kind, s in rope.CHOICES.items() if kind != "none"}
_SCALING_DEFAULTS = {"beta_fast": (32.0,), "beta_slow": (1.0,)}


class TensorSpec(NamedTuple):
    """A tensor of `shape` in the file, and its variable here: path and index on the stacked axis."""

    path: str
    layer: int | None
    shape: tuple[int, ...]
    transposed: bool  # whether the variable is the tensor's transpose


def tensor_specs(model: ModelConfig) -> dict[str, TensorSpec]:
    """{name in transformers: spec} of the model's tensors, in transformers' order."""
    hidden, sizes, family = model.hidden, shapes.kernels(model), FAMILIES[model.family]
    embedding = TensorSpec(names.EMBEDDING, None, (model.vocab_size, hidden), False)
    specs = {"model.embed_tokens.weight": embedding}
    for layer in range(model.layers):
        block = f"model.layers.{layer}"
        for group, kernels in shapes.KERNELS.items():
            for name in kernels:
                path, (fan_in, fan_out) = names.kernel_of(names.LAYERS[name]), sizes[name]
                stem = f"{block}.{MODULES[group]}.{name}_proj"
                specs[f"{stem}.weight"] = TensorSpec(path, layer, (fan_out, fan_in), True)
                if family.qkv_bias and name in "qkv":
                    path = names.bias_of(names.LAYERS[name])
                    specs[f"{stem}.bias"] = TensorSpec(path, layer, (fan_out,), False)
            if group == "attention" and family.qk_norm:
                for name in ("q_norm", "k_norm"):
                    spec = TensorSpec(names.norm(f"{group}/{name}"), layer, (model.head_dim,), False)
                    specs[f"{block}.{MODULES[group]}.{name}.weight"] = spec
        for norm, ours in (("input_layernorm", "attention_norm"), ("post_attention_layernorm", "mlp_norm")):
            specs[f"{block}.{norm}.weight"] = TensorSpec(names.norm(ours), layer, (hidden,), False)
    specs["model.norm.weight"] = TensorSpec(names.FINAL_NORM, None, (hidden,), False)
    if not model.tied_embeddings:
        specs["lm_head.weight"] = TensorSpec(names.HEAD, None, (model.vocab_size, hidden), True)
    return specs


def to_config(model: ModelConfig, *, length: int, dtype: str, special: dict[str, Any]) -> dict[str, Any]:
    """The model's config.json; `length` is used if the model does not limit its positions.

    `special`: {key of SPECIAL: id}. UserError if transformers cannot represent the model.
    """
    family = FAMILIES[model.family]
    if model.family == "llama" and model.hidden % model.heads:
        raise UserError(
            f"model.hidden {model.hidden} is not a multiple of model.heads {model.heads}, "
            f"which {family.architecture} requires: the model cannot be exported"
        )
    positions = model.max_positions or length
    scaling = _rope_config(rope.parse(model.rope_scaling), positions)
    # llama.cpp's converter looks for this key outside of the scaling, too
    original = {_ORIGINAL: scaling[_ORIGINAL]} if scaling and _ORIGINAL in scaling else {}
    return {
        "architectures": [family.architecture],
        "model_type": model.family,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.mlp,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": positions,
        "rms_norm_eps": model.rms_eps,
        "initializer_range": model.init_std,
        "rope_theta": model.rope_theta,  # all versions of transformers read these two keys
        "rope_scaling": scaling,
        **original,
        "tie_word_embeddings": model.tied_embeddings,
        **family.fixed,
        **_window_config(model, family),
        "attention_dropout": 0.0,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # before transformers 5
        **special,
    }


def from_config(config: Any, *, source: Any) -> ModelConfig:
    """The model of a config.json, computed in float32. UserError, naming `source`, if it is not supported."""
    if not isinstance(config, dict):
        raise UserError(f"{source} is not a JSON object: pass the directory of a model")
    kind, architectures = config.get("model_type"), config.get("architectures")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None or architectures not in (None, [], [family.architecture]):
        known = ", ".join(f"{name} ({row.architecture})" for name, row in FAMILIES.items())
        raise UserError(
            f"{source} describes a model of type {kind!r} with architectures {architectures!r}: "
            f"only {known} can be imported"
        )
    config = _DEFAULTS | family.defaults | config
    for key, supported in (_SUPPORTED | {key: (value,) for key, value in family.fixed.items()}).items():
        if key in config and config[key] not in supported:
            raise UserError(f"{source}: {key} = {config[key]!r} is not supported, only {supported[0]!r}")
    integer = lambda key, *default: _integer(config, key, *default, source=source)  # noqa: E731
    hidden, heads = integer("hidden_size"), integer("num_attention_heads")
    layers = integer("num_hidden_layers")
    positions = integer("max_position_embeddings", family.defaults["max_position_embeddings"])
    theta, scaling = _rope(config, positions, source)
    tied = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise UserError(f"{source}: tie_word_embeddings = {tied!r} must be true or false")
    model = ModelConfig(
        vocab_size=integer("vocab_size"),
        hidden=hidden,
        mlp=integer("intermediate_size"),
        layers=layers,
        heads=heads,
        kv_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", max(hidden // heads, 1)),
        compute_dtype="float32",
        family=str(kind),
        tied_embeddings=tied,
        rope_theta=theta,
        rope_scaling=str(scaling),
        max_positions=positions,
        sliding_window=_window(config, family, layers, positions, source),
        rms_eps=_number(config, "rms_norm_eps", _DEFAULTS["rms_norm_eps"], source=source),
        init_std=_number(config, "initializer_range", _DEFAULTS["initializer_range"], source=source),
    )
    try:
        check_heads(model.heads, model.kv_heads, model.head_dim)
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None
    return model


def special_ids(config: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The entries of SPECIAL that are valid ids of the model; eos is a list if there are several."""

    def is_id(value: Any) -> bool:
        return type(value) is int and 0 <= value < model.vocab_size

    ids: dict[str, Any] = {key: config.get(key) for key in SPECIAL}
    if isinstance(ids["eos_token_id"], list):
        eos = [i for i in ids.pop("eos_token_id") if is_id(i)]
        return special_ids(ids, model) | ({"eos_token_id": eos if eos[1:] else eos[0]} if eos else {})
    return {key: value for key, value in ids.items() if is_id(value)}


def _window(config: dict[str, Any], family: Family, layers: int, positions: int, source: Any) -> int:
    """The sliding window of all layers; 0 if they have none, or only some a window that limits nothing."""
    if not family.has_window or config["sliding_window"] is None:
        return 0
    kinds = ["sliding_attention"] * layers
    if family.has_windowless_layers:
        used, first = config["use_sliding_window"], config["max_window_layers"]
        for key, value, kind in (("use_sliding_window", used, bool), ("max_window_layers", first, int)):
            if not isinstance(value, kind):
                raise UserError(f"{source}: {key} = {value!r} must be of type {kind.__name__}")
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
        kinds = config.get("layer_types") or kinds
        if not used or kinds == ["full_attention"] * layers:
            return 0
    window = _integer(config, "sliding_window", source=source)
    if kinds == ["sliding_attention"] * layers:
        return window
    if window < positions:
        raise UserError(
            f"{source}: sliding_window = {window} of only some layers is not supported: if no text is longer "
            "than that, set use_sliding_window to false"
        )
    return 0


def _window_config(model: ModelConfig, family: Family) -> dict[str, Any]:
    """The sliding window in config.json, the same in all layers."""
    if not family.has_window:
        return {}
    window = {"sliding_window": model.sliding_window or None}
    if not family.has_windowless_layers:
        return window
    layers = 0 if model.sliding_window else model.layers
    return {"use_sliding_window": bool(model.sliding_window), **window, "max_window_layers": layers}


def _rope(config: dict[str, Any], positions: int, source: Any) -> tuple[float, Scaling]:
    """(theta, scaling), from `rope_parameters` (transformers 5) or `rope_scaling` (before).

    If both are set, all versions of transformers read `rope_scaling`.
    """
    settings = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise UserError(f"{source}: the rope settings must be one JSON object for all layers")
    theta = _number(settings | ({} if "rope_theta" in settings else config), "rope_theta", 1e4, source=source)
    kind = settings.get("rope_type", settings.get("type", "default"))
    if settings.get("partial_rotary_factor") not in (None, 1.0) or settings.get("truncate", True) is not True:
        raise UserError(f"{source}: rope {kind} with partial_rotary_factor or truncate is not supported")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise UserError(f"{source}: rope {kind!r} is not supported, only {', '.join(_SCALINGS)}")
    scaling = _SCALINGS[kind]
    number = lambda key, *default: _number(settings, key, *default, source=f"{source}, rope {kind}")  # noqa: E731

    def value(name: str) -> float:
        if name == "attention_factor":
            return _attention_factor(settings, number)
        if name != _ORIGINAL:
            return number(name, *_SCALING_DEFAULTS.get(name, ()))
        if scaling is rope.Dynamic:  # transformers uses max_position_embeddings
            return float(positions)
        return _number(config, _ORIGINAL, number(_ORIGINAL, positions), source=source)

    try:
        return theta, scaling(*(value(field.name) for field in dataclasses.fields(scaling)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _attention_factor(settings: dict[str, Any], number: Any) -> float:
    """YaRN's factor on cos and sin: as set, or `0.1 * log(factor) + 1` weighted by `mscale`."""
    if settings.get("attention_factor") is not None:
        return number("attention_factor")
    log = math.log(max(number("factor"), 1.0))
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        return (0.1 * number("mscale") * log + 1) / (0.1 * number("mscale_all_dim") * log + 1)
    return 0.1 * log + 1


def _rope_config(scaling: Scaling, positions: int) -> dict[str, Any] | None:
    """`rope_scaling` in config.json."""
    if isinstance(scaling, rope.Unscaled):
        return None
    settings = {"rope_type": scaling.kind, **dataclasses.asdict(scaling)}
    if isinstance(scaling, rope.Dynamic) and settings.pop(_ORIGINAL) != positions:
        raise UserError(
            f"rope scaling {scaling} must have model.max_positions {positions} as its original length: "
            "transformers stores one number for both"
        )
    if _ORIGINAL in settings:
        settings[_ORIGINAL] = int(settings[_ORIGINAL])
    return settings


def _integer(config: dict[str, Any], key: str, *default: int, source: Any) -> int:
    """The value of `key`, at least 1; the default if it is missing or null."""
    value, limit = config.get(key), LIMITS.get(key, 2**31 - 1)
    value = default[0] if value is None and default else value
    if type(value) is not int or not 1 <= value <= limit:
        raise UserError(f"{source}: {key} = {value!r} must be an integer from 1 to {limit:,}")
    return value


def _number(config: dict[str, Any], key: str, *default: float, source: Any) -> float:
    """The value of `key`, finite and above 0; the default if it is missing or null."""
    value = config.get(key)
    value = default[0] if value is None and default else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
        raise UserError(f"{source}: {key} = {value!r} must be a number above 0")
    return float(value)
