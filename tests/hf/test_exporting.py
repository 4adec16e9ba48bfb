"""An exported model is the run's, bit for bit where it can be; transformers and PEFT compute the same."""

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
from relora_jax.checkpoint.saved import DamagedError, Saved
from relora_jax.config import Config
from relora_jax.core import low_rank
from relora_jax.data.prepared import prepare
from relora_jax.hf import llama as llama_hf
from relora_jax.model.llama import Llama
from tests.support import small
from tests.support.commands import asked_for
from tests.support.documents import texts, write_dataset
from tests.support.exports import MADE, Made, copied, ended, exported, same, saved, tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
        yield saved(folder / "run", MADE, prepare(MADE.data))


def of_model(model: Llama, config: Config = MADE) -> dict[str, np.ndarray]:
    """The tensors of a model of plain layers, by their names there."""
    flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(model))}
    found = {}
    for name, place in llama_hf.tensors(config.model).items():
        array = flat[place.path] if place.layer is None else flat[place.path][place.layer]
        found[name] = array.T if place.transposed else array
    return found


def test_live_factors_are_merged_as_unwrap_does(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    found = tensors(exported(capsys, made, tmp_path / "out"))
    expected = of_model(low_rank.unwrap(copied(made.model)))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=3e-7, atol=1e-8, err_msg=name)


def test_export_asks_for_the_host_alone(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    with asked_for("tpu"):
        exported(capsys, made, tmp_path / "out")
        assert jax.config.jax_platforms == "cpu"  # pyright: ignore


def test_bfloat16_is_the_float32_rounded_to_nearest(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    wide = tensors(exported(capsys, made, tmp_path / "wide"))
    same(
        tensors(exported(capsys, made, tmp_path / "out", "--dtype=bfloat16")),
        {name: array.astype(bfloat16) for name, array in wide.items()},
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_adapter_leaves_the_base_kernels_and_holds_every_factor(
    made: Made, tmp_path: pathlib.Path, capsys: Any
) -> None:
    folder = exported(capsys, made, tmp_path / "out", "--adapter")
    base = copied(made.model)
    for _, dense in low_rank.low_rank_layers(base):
        dense.lora_b[...] = jnp.zeros_like(dense.lora_b[...])
    same(tensors(folder), of_model(low_rank.unwrap(base)))
    (folder / "adapter" / "adapter_model.safetensors").rename(folder / "adapter" / "model.safetensors")
    found = tensors(folder / "adapter")
    assert len(found) == 2 * MADE.model.layers * len(shapes.target_kernels(MADE))
    q = made.model.blocks.attention.q
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    np.testing.assert_array_equal(found[f"{stem}.lora_A.weight"], q.lora_a[1].T)
    np.testing.assert_array_equal(found[f"{stem}.lora_B.weight"], q.lora_b[1].T)


def test_settings_tell_the_special_ids_and_the_reach_of_the_positions(
    made: Made, tmp_path: pathlib.Path, capsys: Any
) -> None:
    folder = exported(capsys, made, tmp_path / "out", "--update=4")
    facts = json.loads((folder / "config.json").read_text())
    tokenizer = made.prepared.tokenizer
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    assert facts.items() >= (special | {"max_position_embeddings": small.LENGTH, "vocab_size": 380}).items()
    assert json.loads((folder / "generation_config.json").read_text()) == special
    read = dataclasses.replace(MADE.model, max_positions=small.LENGTH)
    assert llama_hf.from_config(facts, where="config.json") == read


def test_an_older_export_is_replaced_on_demand(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    folder = exported(capsys, made, tmp_path / "out", "--adapter")
    before = (folder / "model.safetensors").read_bytes()
    words = f"--workdir={made.place}", f"--output={folder}", "--update=4"
    assert "not empty" in ended(capsys, *words, code=2)
    assert (folder / "model.safetensors").read_bytes() == before
    exported(capsys, made, folder, "--update=4", "--overwrite")
    assert not (folder / "adapter").exists() and (folder / "model.safetensors").read_bytes() != before


BAD = {
    "--update=7": "no checkpoint of --update=7: there are 4, 6",
    "--update=4 --adapter": "at 4 has no live factors: export it without --adapter",
    "--dtype=int8": "invalid choice: 'int8' (choose from",
    "--output=": "not empty",
    "--output=checkpoints/9": "lies among the checkpoints of the run",
    "--adaptor": "unrecognized arguments: --adaptor",
}


@pytest.mark.parametrize("words", BAD)
def test_mistake_ends_in_one_line_and_writes_nothing(
    made: Made, tmp_path: pathlib.Path, words: str, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(made.place)
    line = ended(capsys, f"--workdir={made.place}", f"--output={tmp_path}/out", *words.split(), code=2)
    assert line.startswith("error: ") and BAD[words] in line
    assert not list(tmp_path.iterdir())


def test_config_that_was_edited_is_named_in_one_line(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    place = shutil.copytree(made.place, tmp_path / "run")
    config = json.loads((place / "config.json").read_text())
    config["model"]["rope_scaling"] = "fast"
    (place / "config.json").write_text(json.dumps(config))
    line = ended(capsys, f"--workdir={place}", f"--output={tmp_path}/out", code=2)
    assert "config.json: model.rope_scaling: rope scaling 'fast' cannot be read" in line
    assert not (tmp_path / "out").exists()


def test_one_variable_is_read_at_a_time(
    made: Made, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    asked: list[str] = []
    read = Saved.read

    def counting(self: Saved, like: dict[str, Any], **how: Any) -> dict[str, jax.Array]:
        asked.append(" ".join(like))
        return read(self, like, **how)

    monkeypatch.setattr(Saved, "read", counting)
    exported(capsys, made, tmp_path / "out")
    assert not any(" " in paths for paths in asked) and len(set(asked)) == len(asked) == 12 + 2 * 5


def test_checkpoint_that_the_run_deletes_meanwhile_is_named(
    made: Made, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    run = pathlib.Path(shutil.copytree(made.place, tmp_path / "run"))

    def deleting(*_: Any) -> Any:
        shutil.rmtree(run / "checkpoints" / "6" / "state")
        (run / "checkpoints" / "6").rename(run / "gone")
        raise DamagedError("cut")

    monkeypatch.setattr(Saved, "kinds", deleting)
    line = ended(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
    assert "deleted its checkpoint of 6 meanwhile: take a newer one" in line


def test_damaged_checkpoint_is_not_exported(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    run = pathlib.Path(shutil.copytree(made.place, tmp_path / "run"))
    for file in (run / "checkpoints" / "6" / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    line = ended(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
    assert "export another checkpoint, by --update" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_export_needs_no_accelerator(made: Made, tmp_path: pathlib.Path) -> None:
    words = [sys.executable, "-m", "relora_jax.export", f"--workdir={made.place}", f"--output={tmp_path}/out"]
    environment = {**os.environ, "JAX_PLATFORMS": "tpu"}  # which this machine does not have
    process = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert len(tensors(tmp_path / "out")) == len(llama_hf.tensors(MADE.model))


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_export(made: Made, tmp_path: pathlib.Path) -> None:
    words = [f"--workdir={made.place}", f"--output={tmp_path}/out"]
    process = subprocess.Popen(
        [sys.executable, "-m", "relora_jax.export", *words], stderr=subprocess.PIPE, text=True
    )
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 74, said
    assert "mend the disk or the data" in said.splitlines()[-1] and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_config_of_another_run_is_not_exported(made: Made, tmp_path: pathlib.Path, capsys: Any) -> None:
    run = pathlib.Path(shutil.copytree(made.place, tmp_path / "run"))
    saved = json.loads((run / "config.json").read_text())
    for changes in ({"rope_theta": 2e4}, {"layers": saved["model"]["layers"] + 1}):
        (run / "config.json").write_text(json.dumps(saved | {"model": saved["model"] | changes}))
        line = ended(capsys, f"--workdir={run}", f"--output={tmp_path}/out", code=2)
        assert "is of another run (model." in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]
