"""config.json and tensor names convert both ways; unsupported settings are reported by name."""

import dataclasses
import json
from typing import Any

import jax
import pytest
from flax import nnx

from relora_jax.config import ModelConfig
from relora_jax.core.paths import leaves, value_of
from relora_jax.families import FAMILIES
from relora_jax.hf import llama as llama_hf
from relora_jax.model.llama import Llama
from tests.support import small

MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {"kv_heads": 4},
    "grouped-query": {},
    "one key-value head": {"kv_heads": 1},
    "own head dimension": {"head_dim": 6},
    "tied": {"tied_embeddings": True},
    "numbers": {"rope_theta": 5e5, "rms_eps": 1e-5, "init_std": 0.01, "max_positions": 4096},
    "linear": {"rope_scaling": "linear(4.0)"},
    "dynamic": {"rope_scaling": "dynamic(2.0, 4096.0)", "max_positions": 4096},
    "llama3": {"rope_scaling": "llama3(8.0, 1.0, 4.0, 8192.0)"},
    "yarn": {"rope_scaling": "yarn(4.0, 4096.0, 32.0, 1.0, 1.14)"},
    "mistral": {"family": "mistral"},
    "mistral with a window": {"family": "mistral", "sliding_window": 64, "head_dim": 6},
    "qwen2": {"family": "qwen2", "hidden": 18},
    "qwen2 with a window": {"family": "qwen2", "sliding_window": 4096},
    "qwen3": {"family": "qwen3", "head_dim": 6},
}
SPECIAL = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(small.config().model, **{"max_positions": 2048, **changes})


def config(family: str = "llama", **changes: Any) -> dict[str, Any]:
    """The config.json of the toy model; a value of `...` removes its key."""
    facts = llama_hf.to_config(model(family=family), length=12, dtype="float32", special=SPECIAL) | changes
    return {key: value for key, value in facts.items() if value is not ...}


@pytest.mark.parametrize("name", MODELS)
def test_config_round_trip_gives_the_model(name: str) -> None:
    expected = model(**MODELS[name])
    facts = json.loads(json.dumps(llama_hf.to_config(expected, length=12, dtype="float32", special=SPECIAL)))
    assert llama_hf.from_config(facts, source="config.json") == expected


def test_rope_parameters_of_transformers_5_are_read() -> None:
    for scaling in ("linear(4.0)", "llama3(8.0, 1.0, 4.0, 8192.0)", "none"):
        facts = config()
        settings = llama_hf.to_config(model(rope_scaling=scaling), length=1, dtype="", special={})[
            "rope_scaling"
        ]
        facts["rope_parameters"] = {"rope_type": "default", **(settings or {}), "rope_theta": 500.0}
        del facts["rope_theta"], facts["rope_scaling"]
        parsed = llama_hf.from_config(facts, source="config.json")
        assert (parsed.rope_theta, parsed.rope_scaling) == (500.0, scaling)


def test_missing_keys_have_transformers_defaults() -> None:
    names = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings")
    names += ("max_position_embeddings", "rms_norm_eps", "initializer_range", "hidden_act", "attention_bias")
    parsed = llama_hf.from_config(config(**dict.fromkeys(names, ...)), source="config.json")
    assert (parsed.kv_heads, parsed.head_dim, parsed.tied_embeddings) == (4, 4, False)
    assert (parsed.rope_theta, parsed.rope_scaling, parsed.max_positions) == (1e4, "none", 2048)
    assert (parsed.rms_eps, parsed.init_std) == (1e-6, 0.02)
    names += ("sliding_window", "use_sliding_window", "max_window_layers")
    for family, defaults in {
        "mistral": (8, 2, 131_072, 4096),
        "qwen2": (32, 2, 32_768, 0),
        "qwen3": (32, 128, 32_768, 0),
    }.items():
        facts = config(family, hidden_size=64, num_attention_heads=32, **dict.fromkeys(names, ...))
        parsed = llama_hf.from_config(facts, source="config.json")
        assert (parsed.kv_heads, parsed.head_dim, parsed.max_positions, parsed.sliding_window) == defaults


WINDOW = {"use_sliding_window": True, "sliding_window": 64}
WINDOWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama has none": ("llama", WINDOW, 0),
    "of all layers": ("mistral", WINDOW, 64),
    "null": ("mistral", {"sliding_window": None}, 0),
    "a key that mistral lacks": ("mistral", {"use_sliding_window": False, "sliding_window": 64}, 64),
    "unused": ("qwen2", {**WINDOW, "use_sliding_window": False}, 0),
    "unused and no number": ("qwen2", {"use_sliding_window": False, "sliding_window": 0}, 0),
    "used, but null": ("qwen3", {**WINDOW, "sliding_window": None}, 0),
    "above the last layer": ("qwen2", {**WINDOW, "max_window_layers": 2}, 0),
    "from the first layer on": ("qwen2", {**WINDOW, "max_window_layers": 0}, 64),
    "full layers": ("qwen3", {**WINDOW, "max_window_layers": 0, "layer_types": ["full_attention"] * 2}, 0),
    "of some layers, beyond all positions": (
        "qwen2",
        {**WINDOW, "max_window_layers": 1, "max_position_embeddings": 64},
        0,
    ),
    "sliding layers": ("qwen3", {**WINDOW, "layer_types": ["sliding_attention"] * 2}, 64),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_window_is_that_of_all_layers_in_transformers(name: str) -> None:
    family, changes, window = WINDOWS[name]
    assert llama_hf.from_config(config(family, **changes), source="").sliding_window == window


def test_yarn_has_its_papers_default_attention_factor() -> None:
    settings = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    parsed = llama_hf.from_config(config(rope_scaling=settings), source="config.json")
    assert parsed.rope_scaling == "yarn(4.0, 64.0, 32.0, 1.0, 1.138629436111989)"


@pytest.mark.parametrize(
    ("scaling", "original"),
    [("yarn(4, 64, 32, 1, 1.1)", 64), ("llama3(8, 1, 4, 32)", 32), ("linear(2)", None), ("none", None)],
)
def test_original_length_is_also_outside_of_the_scaling_where_llama_cpp_looks(
    scaling: str, original: int | None
) -> None:
    model = dataclasses.replace(small.config().model, rope_scaling=scaling, max_positions=256)
    written = llama_hf.to_config(model, length=256, dtype="float32", special={})
    assert written.get("original_max_position_embeddings") == original


def test_rope_scaling_wins_over_rope_parameters() -> None:
    """As in transformers 5; earlier versions have only `rope_scaling`."""
    linear, other = ({"rope_type": "linear", "factor": factor} for factor in (2.0, 4.0))
    parsed = llama_hf.from_config(config(rope_scaling=linear, rope_parameters=other), source="config.json")
    assert parsed.rope_scaling == "linear(2.0)"


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "type": (
        {"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]},
        "of type 'gemma2' with architectures ['Gemma2ForCausalLM']: only llama (LlamaForCausalLM), "
        "mistral (MistralForCausalLM), qwen2 (Qwen2ForCausalLM), qwen3 (Qwen3ForCausalLM) can be imported",
    ),
    "a type that is a list": ({"model_type": ["llama"]}, "of type ['llama']"),
    "another family's class": ({"architectures": ["MistralForCausalLM"]}, "of type 'llama' with archit"),
    "biases of qwen3": ({"family": "qwen3", "attention_bias": True}, "attention_bias = True"),
    "a window of some layers": (
        {"family": "qwen2", **WINDOW, "max_window_layers": 1},
        "sliding_window = 64 of only some layers is not supported: if no text is longer than that, set use_s",
    ),
    "a window of other layers": (
        {"family": "qwen3", **WINDOW, "layer_types": ["sliding_attention"]},
        "sliding_window = 64 of only some layers is not supported",
    ),
    "a window that is no number": (
        {"family": "mistral", "sliding_window": "64"},
        "sliding_window = '64' must be an integer",
    ),
    "no window": ({"family": "mistral", "sliding_window": 0}, "sliding_window = 0 must be an integer"),
    "maybe a window": (
        {"family": "qwen2", **WINDOW, "use_sliding_window": "no"},
        "use_sliding_window = 'no' must",
    ),
    "layers of a window": (
        {"family": "qwen2", **WINDOW, "max_window_layers": None},
        "max_window_layers = None must be",
    ),
    "no type": ({"model_type": ...}, "of type None"),
    "architecture": ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    "biases": ({"attention_bias": True}, "attention_bias = True is not supported, only False"),
    "mlp biases": ({"mlp_bias": True}, "mlp_bias = True"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported, only 'silu'"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "partly rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "longrope": ({"rope_scaling": {"rope_type": "longrope"}}, "rope 'longrope'"),
    "old name": ({"rope_scaling": {"type": "su"}}, "rope 'su'"),
    "no factor": ({"rope_scaling": {"type": "linear"}}, "factor = None must be a number above 0"),
    "factor": ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor = '4'"),
    "rope": ({"rope_scaling": "linear"}, "rope settings must be one JSON object"),
    "rope of kinds": ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "for all layers"),
    "text": ({"hidden_size": "16"}, "hidden_size = '16' must be an integer"),
    "negative": ({"num_hidden_layers": -1}, "num_hidden_layers = -1"),
    "enormous": ({"num_hidden_layers": 2**30}, "num_hidden_layers = 1073741824"),
    "fraction": ({"intermediate_size": 24.0}, "intermediate_size = 24.0"),
    "truth": ({"vocab_size": True}, "vocab_size = True"),
    "absent": ({"hidden_size": ...}, "hidden_size = None"),
    "heads": ({"num_key_value_heads": 3}, "kv_heads 3 must divide heads 4"),
    "odd": ({"head_dim": 5}, "head_dim 5 must be even"),
    "epsilon": ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
    "tied": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes'"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_setting_is_reported_by_name(name: str) -> None:
    changes, message = UNSUPPORTED[name]
    with pytest.raises(ValueError, match=r"^config.json") as caught:
        llama_hf.from_config(config(**changes), source="config.json")
    assert message in str(caught.value)


def test_model_that_transformers_cannot_represent_is_not_exported() -> None:
    with pytest.raises(ValueError, match=r"18 is not a multiple of model.heads 4"):
        llama_hf.to_config(model(hidden=18), length=12, dtype="float32", special=SPECIAL)
    with pytest.raises(ValueError, match=r"must have model.max_positions 2048 as its original length"):
        llama_hf.to_config(
            model(rope_scaling="dynamic(2, 4096)"), length=12, dtype="float32", special=SPECIAL
        )


# as LlamaForCausalLM.state_dict() has them, of one layer
NAMES = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.layers.0.self_attn.q_proj.weight": "blocks/attention/q/kernel",
    "model.layers.0.self_attn.k_proj.weight": "blocks/attention/k/kernel",
    "model.layers.0.self_attn.v_proj.weight": "blocks/attention/v/kernel",
    "model.layers.0.self_attn.o_proj.weight": "blocks/attention/o/kernel",
    "model.layers.0.mlp.gate_proj.weight": "blocks/mlp/gate/kernel",
    "model.layers.0.mlp.up_proj.weight": "blocks/mlp/up/kernel",
    "model.layers.0.mlp.down_proj.weight": "blocks/mlp/down/kernel",
    "model.layers.0.input_layernorm.weight": "blocks/attention_norm/scale",
    "model.layers.0.post_attention_layernorm.weight": "blocks/mlp_norm/scale",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "head/kernel",
}


# {family: {the name that its own ones follow: those}}
MORE_NAMES: dict[str, dict[str, dict[str, str]]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {
        f"model.layers.0.self_attn.{name}_proj.weight": {
            f"model.layers.0.self_attn.{name}_proj.bias": f"blocks/attention/{name}/bias"
        }
        for name in "qkv"
    },
    "qwen3": {
        "model.layers.0.self_attn.o_proj.weight": {
            f"model.layers.0.self_attn.{name}_norm.weight": f"blocks/attention/{name}_norm/scale"
            for name in "qk"
        }
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_order_are_those_of_transformers(family: str) -> None:
    expected = []
    for name, path in NAMES.items():
        expected += [(name, path), *MORE_NAMES[family].get(name, {}).items()]
    specs = llama_hf.tensor_specs(model(layers=1, family=family))
    assert [(name, spec.path) for name, spec in specs.items()] == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_every_variable_has_exactly_one_tensor(tied: bool, family: str) -> None:
    toy = model(tied_embeddings=tied, family=family, head_dim=6)
    variables = leaves(jax.eval_shape(lambda: nnx.state(Llama(toy, rngs=nnx.Rngs(0)))))
    parts: list[tuple[str, int | None, tuple[int, ...]]] = []
    for path, variable in variables:
        shape = value_of(variable).shape
        layers = range(toy.layers) if path[0] == "blocks" else [None]
        parts += [("/".join(map(str, path)), i, shape if i is None else shape[1:]) for i in layers]
    specs = llama_hf.tensor_specs(toy).values()
    tensors = [(spec.path, spec.layer, spec.shape[::-1] if spec.transposed else spec.shape) for spec in specs]
    assert sorted(tensors, key=str) == sorted(parts, key=str)
