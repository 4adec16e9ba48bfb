"""An imported model has the logits that transformers computes from the same files."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax.checkpoint.variables import variables_of
from relora_jax.model.llama import Llama
from relora_jax.run import record
from tests.support.commands import import_command
from tests.support.transformers_models import MODELS, SMALL, save_model, torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.hf,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LENGTH = 60


def imported_model(workdir: pathlib.Path) -> Llama:
    """The model of an imported run."""
    model = Llama(record.read_config(workdir).model, rngs=nnx.Rngs(0))
    arrays, state = dict(variables_of(workdir, 0)), nnx.state(model)
    for path, variable in nnx.to_flat_state(state):
        variable[...] = jnp.asarray(arrays.pop("/".join(map(str, path))))
    assert not arrays
    nnx.update(model, state)
    return model


IN_CI = ("grouped-query", "mistral", "qwen2", "qwen3")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.ci] if name in IN_CI else []) for name in MODELS]
)
def test_logits_equal_those_of_transformers(tmp_path: pathlib.Path, name: str) -> None:
    theirs = save_model(tmp_path / "model", **MODELS[name])
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    actual = np.asarray(imported_model(tmp_path / "run")(jnp.asarray(ids)))
    deviation = np.abs(actual - expected).max() / np.abs(expected).max()
    print(f"{name}: {deviation:.1e}")
    assert deviation <= 1e-5
    assert len(list((tmp_path / "model").glob("*.safetensors"))) == (3 if name == "sharded" else 1)


def test_window_shorter_than_the_rows_is_another_function(tmp_path: pathlib.Path) -> None:
    """So a config may have rows as long as the window, and no longer."""
    name = "mistral, a window as long as the rows"
    theirs = save_model(tmp_path / "model", **MODELS[name] | {"sliding_window": LENGTH - 1})
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    ids = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, LENGTH)).astype(np.int32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids.astype(np.int64))).logits.numpy()
    actual = np.asarray(imported_model(tmp_path / "run")(jnp.asarray(ids)))
    deviations = np.abs(actual - expected).max((0, 2)) / np.abs(expected).max()
    assert deviations[:-1].max() <= 1e-5 < 1e-3 < deviations[-1]


def test_bfloat16_weights_are_exact(tmp_path: pathlib.Path) -> None:
    theirs = save_model(tmp_path / "model", dtype="bfloat16")
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    arrays = variables_of(tmp_path / "run", 0)
    for layer, block in enumerate(theirs.model.layers):
        expected = block.self_attn.k_proj.weight.detach().numpy().T
        assert np.array_equal(arrays["blocks/attention/k/kernel"][layer], expected)
        expected = block.post_attention_layernorm.weight.detach().numpy()
        assert np.array_equal(arrays["blocks/mlp_norm/scale"][layer], expected)
