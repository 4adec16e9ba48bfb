"""The logits of an imported model are those that transformers computes of the same files."""

import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax import run
from relora_jax.checkpoint import load_model
from relora_jax.model import Llama
from tests.test_import_hf import command

transformers = pytest.importorskip("transformers", reason="needs the extra hf-test")
torch = pytest.importorskip("torch", reason="needs the extra hf-test")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTH = 60
SMALL: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.15,  # so that attention looks at something, and positions matter
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


def made(folder: pathlib.Path, *, shard: int = 10**9, dtype: str = "float32", **changes: Any) -> Any:
    """What transformers loads of its files in `folder`, computed in float32; its norms are not all ones."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | changes))
    for name, tensor in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(tensor, 0.5, 1.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return transformers.LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def imported_model(place: pathlib.Path) -> Llama:
    """The model of a RUN."""
    model = Llama(run.read_config(place).model, rngs=nnx.Rngs(0))
    arrays, state = load_model(place, 0), nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(arrays.pop("/".join(map(str, path))))
    assert not arrays
    nnx.update(model, state)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(tmp_path: pathlib.Path, name: str) -> None:
    theirs = made(tmp_path / "model", **MODELS[name])
    assert command(tmp_path / "model", tmp_path / "run") == 0
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    found = np.asarray(imported_model(tmp_path / "run")(jnp.asarray(ids)))
    deviation = np.abs(found - expected).max() / np.abs(expected).max()
    print(f"{name}: {deviation:.1e}")
    assert deviation <= 1e-5
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == (3 if name == "sharded" else 1)


def test_weights_of_bfloat16_are_exact(tmp_path: pathlib.Path) -> None:
    theirs = made(tmp_path / "model", dtype="bfloat16")
    assert command(tmp_path / "model", tmp_path / "run") == 0
    arrays = load_model(tmp_path / "run", 0)
    for layer, block in enumerate(theirs.model.layers):
        expected = block.self_attn.k_proj.weight.detach().numpy().T
        assert np.array_equal(arrays["blocks/attention/k/kernel"][layer], expected)
        expected = block.post_attention_layernorm.weight.detach().numpy()
        assert np.array_equal(arrays["blocks/mlp_norm/scale"][layer], expected)
