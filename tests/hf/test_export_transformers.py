"""transformers and PEFT compute the run's logits from its export (needs the extra `hf-test`)."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax import export
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.core import low_rank
from relora_jax.data.prepared import Prepared, prepare
from relora_jax.families import FAMILIES
from relora_jax.run import directory, record, warm_start
from relora_jax.storage.writer import Writer
from relora_jax.training import steps
from relora_jax.training.program import Program
from relora_jax.training.state import flatten, model_of
from relora_jax.validate import validate
from tests.support import small
from tests.support.commands import import_command
from tests.support.documents import texts, write_dataset
from tests.support.exports import CONFIG, SavedRun, assert_same, copy_model, export_run, save_run, tensors
from tests.support.transformers_models import MODELS as TRANSFORMERS_MODELS
from tests.support.transformers_models import save_model, torch, transformers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.hf,
]

# Settings with their own keys in config.json; test_import_transformers.py covers the shapes.
MODELS: dict[str, dict[str, Any]] = {
    "tied": {"tied_embeddings": True, "head_dim": 6},
    "linear": {"rope_scaling": "linear(4.0)"},
    "dynamic": {"rope_scaling": "dynamic(2.0, 8.0)", "max_positions": 8},
    "llama3": {"rope_scaling": "llama3(8.0, 1.0, 4.0, 64.0)", "head_dim": 16},
    "yarn": {"rope_scaling": "yarn(4.0, 8.0, 32.0, 1.0, 1.1386)", "head_dim": 16},
    "mistral": {"family": "mistral", "hidden": 18, "sliding_window": 12},
    "qwen2": {"family": "qwen2", "hidden": 18, "head_dim": 6, "sliding_window": 12},
    "qwen3": {"family": "qwen3", "hidden": 18, "tied_embeddings": True},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    folder = tmp_path_factory.mktemp("transformers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
        yield prepare(CONFIG.data)


def full_rank(folder: pathlib.Path, prepared: Prepared, **changes: Any) -> SavedRun:
    """A run of the toy model with `changes` to its config, before the low-rank phase."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, rope_scaling="none"))
    config.model = dataclasses.replace(config.model, **changes)
    if config.model.max_positions:
        config.data = dataclasses.replace(config.data, sequence_length=config.model.max_positions)
        prepared = prepare(config.data)
    return save_run(folder / "run", config, prepared, updates=[4])


@pytest.fixture(scope="module")
def mid_cycle(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return save_run(tmp_path_factory.mktemp("mid_cycle") / "run", CONFIG, prepared)


def load(folder: pathlib.Path, **options: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.eval()


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))).logits.float().numpy()


def assert_close(actual: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    """Within a tolerance relative to the largest logit."""
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def ids(rows: int, length: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 380, (rows, length)).astype(np.int32)


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_an_export_equal_the_runs(
    prepared: Prepared, tmp_path: pathlib.Path, name: str, capsys: Any
) -> None:
    run = full_rank(tmp_path, prepared, **MODELS[name])
    model = load(export_run(capsys, run, tmp_path / "out"))
    assert type(model).__name__ == FAMILIES[MODELS[name].get("family", "llama")].architecture
    assert_close(logits_of(model, ids(3)), np.asarray(run.model(jnp.asarray(ids(3)))))


@pytest.mark.ci
def test_perplexity_of_a_mid_cycle_export_equals_the_runs(
    mid_cycle: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    model = load(export_run(capsys, mid_cycle, tmp_path / "out"))
    text, lengths = mid_cycle.prepared.validation.read(range(100 // small.LENGTH))
    assert set(lengths) == {small.LENGTH + 1}
    with torch.no_grad():
        text = torch.from_numpy(text.astype(np.int64))
        mean = model(text, labels=text).loss.item()
    assert lengths.sum() - len(lengths) == mid_cycle.at[6].tokens
    assert math.isclose(math.exp(mean), mid_cycle.at[6].perplexity, rel_tol=1e-4)
    assert not math.isclose(mid_cycle.at[4].perplexity, mid_cycle.at[6].perplexity, rel_tol=1e-2)


def test_bfloat16_export_loads_as_bfloat16(mid_cycle: SavedRun, tmp_path: pathlib.Path, capsys: Any) -> None:
    model = load(export_run(capsys, mid_cycle, tmp_path / "out", "--dtype=bfloat16"))
    assert model.dtype == torch.bfloat16
    plain = low_rank.unwrap(copy_model(mid_cycle.model))
    rounded = nnx.state(plain)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), rounded)
    nnx.update(plain, rounded)
    assert_close(logits_of(model.float(), ids(3)), np.asarray(plain(jnp.asarray(ids(3)))))


def trained_through_restarts(folder: pathlib.Path, **model: Any) -> tuple[pathlib.Path, Program, Any]:
    """A model that transformers saved, imported and trained in three cycles: its run, program and state."""
    save_model(folder / "model", **model)
    assert import_command(folder / "model", folder / "run") == 0
    config, start = record.read_config(folder / "run"), small.config()
    changes = {"warm_start_updates": 0, "warm_up_updates": 0, "cycle_updates": 6, "peak_lr": 1e-2}
    config.relora = dataclasses.replace(start.relora, **changes)
    config.arm, config.data = "relora", dataclasses.replace(start.data, sequence_length=12)
    config.train = dataclasses.replace(start.train, init_from=str(folder / "run"), updates=18)
    config.optimizer = dataclasses.replace(start.optimizer, warm_up_updates=0)
    validate(config, devices=1)
    program, workdir = Program(config, small.mesh()), folder / "trained"
    state = warm_start.load(warm_start.find(config), program)
    state, losses = small.run(config, program, state=state)
    assert losses[-1] < losses[0] - 0.1 and steps.restarts_done(config, 18) == 2
    with directory.locked(Writer(workdir), config), Checkpoints(workdir, config) as checkpoints:
        directory.begin(Writer(workdir), config, rows={}, imported_from="transformers")
        checkpoints._write(18, flatten(state))
        checkpoints.wait()
    return workdir, program, state


@pytest.mark.parametrize("family", FAMILIES)
def test_model_of_a_family_is_trained_through_restarts_and_exported_as_its_own_class(
    tmp_path: pathlib.Path, family: str
) -> None:
    name = "grouped-query" if family == "llama" else family
    workdir, program, state = trained_through_restarts(tmp_path, **TRANSFORMERS_MODELS[name])
    args = [f"--workdir={workdir}", f"--output={tmp_path / 'out'}"]
    assert export.main(["export", *args]) == 0
    original, model = load(tmp_path / "model"), load(tmp_path / "out")
    assert type(model) is type(original)
    assert type(model).__name__ == FAMILIES[family].architecture
    for key in ("sliding_window", "num_key_value_heads", "tie_word_embeddings", "max_position_embeddings"):
        assert getattr(model.config, key, None) == getattr(original.config, key, None), key
    text = np.random.default_rng(0).integers(0, 99, (3, 12)).astype(np.int32)
    expected = np.asarray(program.low_phase.model(state.trained, state.frozen)(jnp.asarray(text)))
    assert_close(logits_of(model, text), expected)
    assert np.abs(logits_of(original, text) - expected).max() > 0.1 * np.abs(expected).max()
    for key, tensor in model.named_parameters():  # every part was trained
        assert not torch.equal(tensor, original.get_parameter(key)), key


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # raised by peft
@pytest.mark.ci
def test_factors_on_a_base_with_biases_give_the_logits_of_the_run(tmp_path: pathlib.Path) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra hf-test")
    workdir, program, state = trained_through_restarts(tmp_path, **TRANSFORMERS_MODELS["qwen2"])
    args = [f"--workdir={workdir}", f"--output={tmp_path / 'out'}", "--adapter"]
    assert export.main(["export", *args]) == 0
    model = peft.PeftModel.from_pretrained(load(tmp_path / "out"), tmp_path / "out" / "adapter").eval()
    text = np.random.default_rng(0).integers(0, 99, (3, 12)).astype(np.int32)
    expected = np.asarray(program.low_phase.model(state.trained, state.frozen)(jnp.asarray(text)))
    assert_close(logits_of(model, text), expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # raised by peft
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_factors_on_the_base_give_the_logits_of_the_run(
    mid_cycle: SavedRun, tmp_path: pathlib.Path, dtype: str, capsys: Any
) -> None:
    peft = pytest.importorskip("peft", reason="needs the extra hf-test")
    expected = np.asarray(mid_cycle.model(jnp.asarray(ids(3))))
    folder = export_run(capsys, mid_cycle, tmp_path / "out", "--adapter", f"--dtype={dtype}")
    base = load(folder, dtype=torch.float32)
    alone = logits_of(base, ids(3))
    both = logits_of(peft.PeftModel.from_pretrained(base, folder / "adapter").eval(), ids(3))
    assert_close(both, expected, 1e-5 if dtype == "float32" else 3e-2)
    assert np.abs(alone - expected).max() > 0.1 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["grouped-query", "bfloat16", "sharded"])
def test_export_of_an_untrained_import_is_bit_identical(
    tmp_path: pathlib.Path, kind: str, capsys: Any
) -> None:
    special = {"bos_token_id": 3, "eos_token_id": [2, 7], "pad_token_id": 5 if kind == "sharded" else None}
    save_model(tmp_path / "model", **{**TRANSFORMERS_MODELS[kind], "num_key_value_heads": 2}, **special)
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    config = record.read_config(tmp_path / "run")
    config.arm, config.train = "relora", dataclasses.replace(config.train, init_from=str(tmp_path / "run"))
    program = Program(config, small.mesh())
    checkpoint = warm_start.find(config)
    u, state = checkpoint.update, warm_start.load(checkpoint, program)
    again = tmp_path / "again"
    with directory.locked(Writer(again), config), Checkpoints(again, config) as checkpoints:
        directory.begin(Writer(again), config, rows={}, imported_from="transformers")
        checkpoints._write(u, flatten(state))
        checkpoints.wait()
        checkpoints._write(u + 1, flatten(model_of(program.start_low_rank(state))))  # no update was done
    dtype = "float32" if kind == "grouped-query" else "bfloat16"
    expected = tensors(tmp_path / "model")
    capsys.readouterr()
    for workdir, args in ((tmp_path / "run", []), (again, ["--update=0"]), (again, ["--update=1"])):
        args = [
            f"--workdir={workdir}",
            f"--output={tmp_path / 'out'}",
            f"--dtype={dtype}",
            "--overwrite",
            *args,
        ]
        export.main(["export", *args])
        assert_same(tensors(tmp_path / "out"), expected)
        if workdir == tmp_path / "run":
            model = load(tmp_path / "out")
            assert {key: getattr(model.config, key) for key in special} == special
            assert model.get_input_embeddings().padding_idx == special["pad_token_id"]
