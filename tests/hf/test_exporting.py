"""An exported model has the run's tensors, bit for bit where nothing is merged or rounded."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_dtypes import bfloat16

from relora_jax import shapes
from relora_jax.checkpoint.saved import Checkpoint, DamagedError
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import Config
from relora_jax.core import low_rank
from relora_jax.data.prepared import prepare
from relora_jax.hf import llama as llama_hf
from relora_jax.model.llama import Llama
from tests.support import small
from tests.support.commands import jax_platforms
from tests.support.documents import texts, write_dataset
from tests.support.exports import (
    CONFIG,
    SavedRun,
    assert_same,
    copy_model,
    export_run,
    output_line,
    save_run,
    tensors,
)


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SavedRun]:
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
        yield save_run(folder / "run", CONFIG, prepare(CONFIG.data))


def of_model(model: Llama, config: Config = CONFIG) -> dict[str, np.ndarray]:
    """{name in transformers: tensor} of a model without factors."""
    flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))}
    result = {}
    for name, spec in llama_hf.tensor_specs(config.model).items():
        array = flat[spec.path] if spec.layer is None else flat[spec.path][spec.layer]
        result[name] = array.T if spec.transposed else array
    return result


def test_live_factors_are_merged_as_by_unwrap(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    actual = tensors(export_run(capsys, saved_run, tmp_path / "out"))
    expected = of_model(low_rank.unwrap(copy_model(saved_run.model)))
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(actual[name], array, rtol=3e-7, atol=1e-8, err_msg=name)


def test_export_uses_only_the_cpu(saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any) -> None:
    with jax_platforms("tpu"):
        export_run(capsys, saved_run, tmp_path / "out")
        assert jax.config.jax_platforms == "cpu"  # pyright: ignore


def test_bfloat16_export_is_float32_rounded_to_nearest(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    wide = tensors(export_run(capsys, saved_run, tmp_path / "wide"))
    assert_same(
        tensors(export_run(capsys, saved_run, tmp_path / "out", "--dtype=bfloat16")),
        {name: array.astype(bfloat16) for name, array in wide.items()},
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_frozen_a_is_exported_like_a_trained_one(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    config = dataclasses.replace(CONFIG, relora=dataclasses.replace(CONFIG.relora, restart="one_sided"))
    run = save_run(tmp_path / "run", config, saved_run.prepared)
    merged = of_model(low_rank.unwrap(copy_model(run.model)))
    actual = tensors(export_run(capsys, run, tmp_path / "out"))
    for name, array in merged.items():
        np.testing.assert_allclose(actual[name], array, rtol=3e-7, atol=1e-8, err_msg=name)
    adapter = export_run(capsys, run, tmp_path / "adapted", "--adapter") / "adapter"
    (adapter / "adapter_model.safetensors").rename(adapter / "model.safetensors")
    q, stem = run.model.blocks.attention.q, "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(tensors(adapter)[f"{stem}.lora_A.weight"], q.lora_a[1].T)
    np.testing.assert_array_equal(tensors(adapter)[f"{stem}.lora_B.weight"], q.lora_b[1].T)
    variables = variables_of(run.workdir, 6)
    assert sorted(variables) == sorted(variables_of(saved_run.workdir, 6))
    np.testing.assert_array_equal(variables["blocks/attention/q/lora_a"], q.lora_a[...])


def test_adapter_has_every_factor_and_leaves_base_kernels_unmerged(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    folder = export_run(capsys, saved_run, tmp_path / "out", "--adapter")
    base = copy_model(saved_run.model)
    for _, dense in low_rank.low_rank_layers(base):
        dense.lora_b[...] = jnp.zeros_like(dense.lora_b[...])
    assert_same(tensors(folder), of_model(low_rank.unwrap(base)))
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "model.safetensors")
    factors = tensors(folder / "adapter")
    assert len(factors) == 2 * CONFIG.model.layers * len(shapes.target_kernels(CONFIG))
    q = saved_run.model.blocks.attention.q
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(factors[f"{stem}.lora_A.weight"], q.lora_a[1].T)
    np.testing.assert_array_equal(factors[f"{stem}.lora_B.weight"], q.lora_b[1].T)


@pytest.mark.parametrize("name", ["", "meta-llama/Llama-3.2-1B", "/models/base"])
def test_adapter_names_its_base_as_given_or_relative_to_itself(
    saved_run: SavedRun, tmp_path: pathlib.Path, name: str, capsys: Any
) -> None:
    args = [f"--base_name={name}"] if name else []
    folder = export_run(capsys, saved_run, tmp_path / "out", "--adapter", *args)
    settings = (folder / "adapter" / "adapter_config.json").read_text()
    assert json.loads(settings)["base_model_name_or_path"] == (name or "..")
    assert str(tmp_path) not in settings
    assert name or (folder / "adapter" / "..").resolve() == folder


def test_configs_have_special_ids_and_max_positions(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    folder = export_run(capsys, saved_run, tmp_path / "out", "--update=4")
    facts = json.loads((folder / "config.json").read_text())
    tokenizer = saved_run.prepared.tokenizer
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    assert facts.items() >= (special | {"max_position_embeddings": small.LENGTH, "vocab_size": 380}).items()
    assert json.loads((folder / "generation_config.json").read_text()) == special
    read = dataclasses.replace(CONFIG.model, max_positions=small.LENGTH)
    assert llama_hf.from_config(facts, source="config.json") == read


def test_overwrite_replaces_an_older_export(saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = export_run(capsys, saved_run, tmp_path / "out", "--adapter")
    before = (folder / "model.safetensors").read_bytes()
    args = f"--workdir={saved_run.workdir}", f"--output={folder}", "--update=4"
    assert "not empty" in output_line(capsys, *args, code=2)
    assert (folder / "model.safetensors").read_bytes() == before
    export_run(capsys, saved_run, folder, "--update=4", "--overwrite")
    assert not (folder / "adapter").exists() and (folder / "model.safetensors").read_bytes() != before


BAD = {
    "--update=7": "no checkpoint at --update=7: choose one of 4, 6",
    "--update=4 --adapter": "has no live factors: export it without --adapter",
    "--base_name=llama": "--base_name=llama names the base of an adapter: add --adapter",
    "--dtype=int8": "invalid choice: 'int8' (choose from",
    "--output=": "not empty",
    "--output=checkpoints/9": "is inside the run's checkpoints",
    "--adaptor": "unrecognized arguments: --adaptor",
}


@pytest.mark.parametrize("args", BAD)
def test_usage_error_is_one_line_and_writes_nothing(
    saved_run: SavedRun, tmp_path: pathlib.Path, args: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(saved_run.workdir)
    line = output_line(
        capsys, f"--workdir={saved_run.workdir}", f"--output={tmp_path}/out", *args.split(), code=2
    )
    assert line.startswith("error: ") and BAD[args] in line
    assert not list(tmp_path.iterdir())


def test_edited_config_is_reported_in_one_line(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    run = shutil.copytree(saved_run.workdir, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"]["rope_scaling"] = "fast"
    (run / "config.json").write_text(json.dumps(config))
    line = output_line(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
    assert "config.json: model.rope_scaling: rope scaling 'fast' is not valid" in line
    assert not (tmp_path / "out").exists()


def test_one_variable_is_read_at_a_time(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    reads: list[str] = []
    read = Checkpoint.read

    def counting(self: Checkpoint, like: dict[str, Any], **options: Any) -> dict[str, jax.Array]:
        reads.append(" ".join(like))
        return read(self, like, **options)

    monkeypatch.setattr(Checkpoint, "read", counting)
    export_run(capsys, saved_run, tmp_path / "out")
    assert not any(" " in paths for paths in reads) and len(set(reads)) == len(reads) == 12 + 2 * 5


def test_checkpoint_deleted_during_export_is_reported(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    run = pathlib.Path(shutil.copytree(saved_run.workdir, tmp_path / "run"))

    def deleting(*_: Any) -> Any:
        shutil.rmtree(run / "checkpoints" / "6" / "state")
        (run / "checkpoints" / "6").rename(run / "gone")
        raise DamagedError("cut")

    monkeypatch.setattr(Checkpoint, "specs", property(deleting))
    line = output_line(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
    assert "has deleted its checkpoint at update 6: use a newer one" in line


def test_damaged_checkpoint_is_not_exported(saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any) -> None:
    run = pathlib.Path(shutil.copytree(saved_run.workdir, tmp_path / "run"))
    for file in (run / "checkpoints" / "6" / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    line = output_line(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
    assert "export another checkpoint with --update" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_export_needs_no_accelerator(saved_run: SavedRun, tmp_path: pathlib.Path) -> None:
    args = [
        sys.executable,
        "-m",
        "relora_jax.export",
        f"--workdir={saved_run.workdir}",
        f"--output={tmp_path}/out",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}  # which this machine does not have
    process = subprocess.run(args, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(tensors(tmp_path / "out")) == len(llama_hf.tensor_specs(CONFIG.model))


@pytest.mark.slow
def test_full_disk_leaves_no_partial_export(saved_run: SavedRun, tmp_path: pathlib.Path) -> None:
    args = [f"--workdir={saved_run.workdir}", f"--output={tmp_path}/out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "relora_jax.export", *args], stderr=subprocess.PIPE, text=True
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    stderr = process.communicate(timeout=300)[1]
    assert process.returncode == 74, stderr
    assert "fix the disk or the data" in stderr.splitlines()[-1] and "Traceback" not in stderr
    assert not list(tmp_path.iterdir())


def test_config_of_another_run_is_not_exported(
    saved_run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    run = pathlib.Path(shutil.copytree(saved_run.workdir, tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text())
    for changes in ({"rope_theta": 2e4}, {"layers": saved["model"]["layers"] + 1}):
        (run / "config.json").write_text(json.dumps(saved | {"model": saved["model"] | changes}))
        line = output_line(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
        assert "belongs to another run (model." in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
