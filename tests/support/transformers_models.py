"""Toy models of each family saved by transformers; needs the extra hf-test."""

import pathlib
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="needs the extra hf-test")
torch = pytest.importorskip("torch", reason="needs the extra hf-test")

SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.15,  # large enough that attention and positions matter
}


ORIGINAL = {"original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}


MODELS: dict[str, dict[str, Any]] = {
    "multi-head": {},
    "grouped-query": {"num_key_value_heads": 2},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "own head dimension": {"head_dim": 6, "num_key_value_heads": 2},
    "epsilon": {"rms_norm_eps": 1e-2},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 32,
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, **ORIGINAL}},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16", "num_key_value_heads": 2},
    "sharded": {"shard": 20_000, "dtype": "bfloat16", "tie_word_embeddings": True, "num_key_value_heads": 1},
    "mistral": {"family": "mistral", "num_key_value_heads": 2, "sliding_window": None},
    "mistral, a window as long as the rows": {
        **{"family": "mistral", "num_key_value_heads": 4, "sliding_window": 60, "head_dim": 6}
    },
    "qwen2": {"family": "qwen2", "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen2, a window as long as the rows": {
        **{"family": "qwen2", "num_key_value_heads": 4, "use_sliding_window": True},
        **{"sliding_window": 60, "max_window_layers": 0, "dtype": "bfloat16"},
    },
    "qwen3": {"family": "qwen3", "num_key_value_heads": 2, "head_dim": 6},
    "qwen3 of other shapes": {
        **{"family": "qwen3", "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True},
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, **ORIGINAL},
    },
}


def save_model(
    folder: pathlib.Path,
    *,
    family: str = "llama",
    shard: int = 10**9,
    dtype: str = "float32",
    **changes: Any,
) -> Any:
    """Saves a model with norms other than 1 and biases other than 0; returns it as loaded, in float32."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **SMALL | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, tensor in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(tensor)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
