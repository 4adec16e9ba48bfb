"""Toy LLaMAs saved by transformers; needs the extra hf-test."""

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
}


def save_llama(folder: pathlib.Path, *, shard: int = 10**9, dtype: str = "float32", **changes: Any) -> Any:
    """Saves a model with norms other than one in `folder`; returns it as loaded from there, in float32."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes))
    for name, tensor in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
