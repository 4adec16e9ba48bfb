"""A checkpoint in transformers' format becomes a run to start from, or nothing is written."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors import safe_open

from relora_jax import cli, errors, evaluate, export, generate, import_hf
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import ModelConfig, to_json
from relora_jax.data import prepared
from relora_jax.hf import exporting, importing, starting_config
from relora_jax.hf import llama as llama_hf
from relora_jax.hf.tensor_files import FILE, INDEX, TensorFiles
from relora_jax.run import directory, record, restored, warm_start
from relora_jax.storage import atomic, writer
from relora_jax.tokenizer import tokenizer
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from relora_jax.validate import validate
from tests.support import small
from tests.support.commands import import_command
from tests.support.documents import texts
from tests.support.tensors import write_tensors
from tests.support.tokenizers import CODE, LLAMA, SPECIAL, json_file, tied, trained

MODEL = dataclasses.replace(
    small.config().model, vocab_size=380, rope_scaling="llama3(8.0, 1.0, 4.0, 64.0)", max_positions=256
)
TIED = dataclasses.replace(MODEL, tied_embeddings=True)
HEAD = "lm_head.weight"
COMPUTED = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


def arrays(model: ModelConfig = MODEL, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """{name in transformers: tensor}, with values that are exact in all three dtypes."""
    rng = np.random.default_rng(0)
    specs = llama_hf.tensor_specs(model).items()
    return {name: (rng.integers(-99, 99, spec.shape) / 64).astype(dtype) for name, spec in specs}


def config_json(model: ModelConfig = MODEL, **changes: Any) -> dict[str, Any]:
    special = {"bos_token_id": None, "eos_token_id": 3, "pad_token_id": 1}
    return llama_hf.to_config(model, length=256, dtype="float32", special=special) | changes


def write(
    folder: pathlib.Path,
    model: ModelConfig = MODEL,
    tensors: dict[str, np.ndarray] | None = None,
    **options: Any,
) -> pathlib.Path:
    """Writes the directory of a model without a tokenizer."""
    tensors = arrays(model) if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model)))
    write_tensors(folder, tensors, **options)
    return folder


def error_line(capsys: Any, source: pathlib.Path, workdir: pathlib.Path, *args: str) -> str:
    """The error line of a command that rejects its input."""
    assert import_command(source, workdir, *args) == errors.BAD_SETTING
    stderr = capsys.readouterr().err.strip()
    assert stderr.startswith("error: ") and stderr.isprintable() and len(stderr) < 2100, stderr
    return stderr


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The imported toy model with a tokenizer, whose files are links in the model's directory."""
    folder = tmp_path_factory.mktemp("imported")
    json_file(folder / "blobs", tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>"})
    source = write(folder / "model", shard_bytes=9_000)
    for path in (folder / "blobs").iterdir():
        (source / path.name).symlink_to(f"../blobs/{path.name}")
    assert import_command(source, folder / "run") == 0
    assert len(list(source.glob("*.safetensors"))) > 3
    return folder / "run"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_tensor_is_imported_bit_for_bit(tmp_path: pathlib.Path, dtype: Any) -> None:
    tensors = arrays(dtype=dtype)
    write(tmp_path / "model", tensors=tensors)
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    assert updates_saved(tmp_path / "run") == [0]
    variables = variables_of(tmp_path / "run", 0)
    for name, spec in llama_hf.tensor_specs(MODEL).items():
        array = variables[spec.path] if spec.layer is None else variables[spec.path][spec.layer]
        expected = tensors[name].astype(np.float32)
        assert array.dtype == np.float32
        assert np.array_equal(array.T if spec.transposed else array, expected), name
    config = cli.parse(["train", f"--config={tmp_path / 'run' / 'config.py'}"])[0]
    assert config.model.compute_dtype == ("float32" if dtype == np.float32 else "bfloat16")
    assert record.read_config(tmp_path / "run").model.compute_dtype == "float32"


@pytest.mark.parametrize("arm", ["full", "lora", "lora_warm", "relora"])
def test_starting_config_is_valid_in_every_arm(imported: pathlib.Path, arm: str) -> None:
    config = cli.parse(["train", f"--config={imported / 'config.py'}:{arm}"])[0]
    assert (config.model, config.arm, config.train.init_from) == (MODEL, arm, str(imported))
    assert config.data.tokenizer == str(imported / "tokenizer")
    assert config.data.text == config.data.dataset == ""
    for devices in (1, 2, 4, 8):
        validate(config, devices=devices)
    cycle, updates = config.relora.cycle_updates, config.train.updates
    assert config.relora.warm_start_updates == 0 and (updates - 1) // cycle == 3  # restarts
    warm_start.find(config)


def test_imported_model_has_no_control_arm(imported: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="no control arm: choose full"):
        cli.parse(["train", f"--config={imported / 'config.py'}:control"])


def test_starting_config_is_valid_for_any_model_shape(tmp_path: pathlib.Path) -> None:
    shape = {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32, "head_dim": 128}
    for n, changes in enumerate(
        (
            {**shape, "kv_heads": 8, "max_positions": 131_072},
            {"hidden": 2, "mlp": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "max_positions": 1},
            {"rope_theta": 5e5, "rms_eps": 1e-5, "max_positions": 0},
        )
    ):
        run = tmp_path / f"a 'run' \"{n}\" \\x41"
        run.mkdir()
        model = dataclasses.replace(MODEL, **changes)
        (run / "config.py").write_text(starting_config.text(model, run, source='the """ model\n\\'))
        facts = {"compute_dtype": "bfloat16", "rows": {"train": {"eos": 3}}}
        (run / "run.json").write_text(json.dumps(facts))
        full_rank = starting_config.of_model(model, str(run), "full", compute_dtype="float32", ids={})
        (run / "config.json").write_text(to_json(full_rank))
        config = cli.parse(["train", f"--config={run / 'config.py'}"])[0]
        validate(config, devices=8)
        assert config.train.init_from == str(run) and config.name == run.name and config.data.eos_id == 3
        large = model.hidden == 4096
        assert config.model == dataclasses.replace(
            model, compute_dtype="bfloat16", remat="full" if large else "auto"
        )
        assert config.relora.rank == (128 if large else 1 if model.hidden == 2 else 4)
        assert config.data.sequence_length == min(1024, model.max_positions or 1024)


def test_imported_run_is_the_model_in_float32(imported: pathlib.Path) -> None:
    config, facts = record.read_config(imported), record.read_facts(imported)
    assert (config.model, config.arm, config.train.init_from) == (MODEL, "full", "")
    own = tokenizer.load(imported / "tokenizer" / "tokenizer.json")
    [bos] = tokenizer.prefix(own.path)
    assert facts["rows"] == {"train": {"tokenizer": own.sha256, "eos": own.eos, "pad": own.pad, "bos": bos}}
    assert (config.data.eos_id, config.data.pad_id, config.data.bos_id) == (own.eos, own.pad, bos)
    assert facts["imported_from"] == str(imported.parent / "model") and "unigram_perplexity" not in facts
    assert not any(path.is_symlink() for path in imported.rglob("*"))
    names = {pattern.partition("/")[0] for pattern in importing.OUTPUT_FILES}
    # __pycache__: of Python, once a test has read the config
    assert {path.name for path in imported.iterdir()} - {"__pycache__"} == names | {atomic.MARK}
    assert {path.name for path in (imported / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_run_must_use_the_imported_tokenizer(imported: pathlib.Path) -> None:
    config = cli.parse(["train", f"--config={imported / 'config.py'}"])[0]
    own = record.read_facts(imported)["rows"]
    warm_start.check_tokenizer(config, own)
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        warm_start.check_tokenizer(config, {"train": {**own["train"], "tokenizer": "another"}})


def test_moved_run_finds_its_tokenizer_inside_or_by_flag(
    imported: pathlib.Path, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = pathlib.Path(shutil.copytree(imported, tmp_path / "run"))
    config = record.read_config(run)
    config.data.tokenizer = "runs/before/tokenizer"
    (run / "config.json").write_text(to_json(config))
    assert restored.tokenizer_of(run, config, "").path == run / "tokenizer" / "tokenizer.json"
    (run / "tokenizer").rename(tmp_path / "moved")
    json_file(tmp_path / "other", special=[*SPECIAL, "<x>"])

    def stderr_of(command: Any, *args: str) -> str:
        args = f"--workdir={run}", *args, *([f"--output={tmp_path / 'out'}"] if command is export else [])
        with pytest.raises(SystemExit) as stop:
            cli.main(command.main, command.__doc__, ["a command", *args])
        assert stop.value.code == (0 if (tmp_path / "out").exists() else errors.BAD_SETTING)
        return capsys.readouterr().err

    for command in (evaluate, generate, export):
        assert "'runs/before/tokenizer' not found: pass its path as --tokenizer=PATH" in stderr_of(command)
        assert "was trained with a tokenizer other than other" in stderr_of(command, "--tokenizer=other")
        assert "tokenizer 'gone' not found" in stderr_of(command, "--tokenizer=gone")
    assert stderr_of(export, "--tokenizer=moved") == ""
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_run_starts_from_the_imported_weights(imported: pathlib.Path) -> None:
    config = cli.parse(["train", f"--config={imported / 'config.py'}"])[0]
    program = Program(config, small.mesh())
    state = warm_start.load(warm_start.find(config), program)
    loaded = flatten(state)
    for path, array in variables_of(imported, 0).items():
        assert np.array_equal(loaded[f"trained/{path}"], array), path
    assert int(state.update) == 0 and not any(np.asarray(x).any() for x in state.tokens_seen)


def test_redundant_tensors_are_accepted(tmp_path: pathlib.Path) -> None:
    tensors = arrays(TIED, dtype=ml_dtypes.bfloat16)
    embeddings = tensors["model.embed_tokens.weight"]
    more = {HEAD: embeddings, **dict.fromkeys(COMPUTED, np.ones(2, np.float32))}
    write(tmp_path / "model", TIED, tensors | more)
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    variable = variables_of(tmp_path / "run", 0)["embed/embedding"]
    assert np.array_equal(variable, embeddings.astype(np.float32))
    config = cli.parse(["train", f"--config={tmp_path / 'run' / 'config.py'}"])[0]
    assert config.model.compute_dtype == "bfloat16"  # as the model's own tensors


@pytest.mark.parametrize(
    ("first", "bos", "message"),
    [
        (["<s>", "<s>"], 2, "adds 2 ids before a text (2, 2), documents start with one: edit its post_"),
        (["<pad>", "<s>"], None, "adds 2 ids before a text (1, 2), documents start with none of them: edit"),
        (["<s>"], 2, ""),
    ],
)
def test_template_that_adds_bos_twice_is_a_warning(
    tmp_path: pathlib.Path, first: list[str], bos: int | None, message: str, capsys: Any
) -> None:
    source = write(tmp_path / "model")
    path = json_file(source)
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*first, "$A"], special_tokens=[(token, raw.token_to_id(token)) for token in {*first}]
    )
    raw.save(str(path))
    assert import_command(source, tmp_path / "run") == 0
    assert message in (err := capsys.readouterr().err) and err.count("warning") == (1 if message else 0)
    assert record.read_facts(tmp_path / "run")["rows"]["train"].get("bos") == bos


def index_with(*names: str, without: tuple[str, ...] = ()) -> Callable[[pathlib.Path], Any]:
    """Moves the tensors to a file with an index that lists `names` as well, and not those in `without`."""

    def make(folder: pathlib.Path) -> None:
        (folder / FILE).rename(folder / "a.safetensors")
        listed = {*tensor_names(folder / "a.safetensors"), *names} - {*without}
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(listed, "a.safetensors")}))

    return make


def tensor_names(path: pathlib.Path) -> list[str]:
    with safe_open(path, framework="np") as file:
        return list(file.keys())


def test_index_and_files_may_differ_in_redundant_tensors(tmp_path: pathlib.Path) -> None:
    """As in transformers: the head of a tied model is never read, nor are computed buffers."""
    for case, (more, make) in enumerate(
        (
            ({}, index_with(HEAD, *COMPUTED)),
            ({HEAD: arrays(TIED)["model.embed_tokens.weight"]}, index_with(without=(HEAD,))),
            (dict.fromkeys(COMPUTED, np.ones(2)), index_with(without=COMPUTED)),  # an unsupported dtype
        )
    ):
        source = write(tmp_path / f"model{case}", TIED, arrays(TIED) | more)
        make(source)
        assert import_command(source, tmp_path / f"run{case}") == 0
        assert np.array_equal(
            variables_of(tmp_path / f"run{case}", 0)["embed/embedding"],
            arrays(TIED)["model.embed_tokens.weight"],
        )


FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 64},
    "qwen2": {"tied_embeddings": True},
    "qwen3": {"head_dim": 6},
}


@pytest.mark.parametrize("family", FAMILY_MODELS)
def test_imported_family_is_exported_as_itself(tmp_path: pathlib.Path, family: str) -> None:
    model = dataclasses.replace(MODEL, family=family, **FAMILY_MODELS[family])
    write(tmp_path / "model", model)
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    for arm in ("full", "relora"):
        config = cli.parse(["train", f"--config={tmp_path / 'run' / 'config.py'}:{arm}"])[0]
        validate(config, devices=1)
        assert config.model == model
        assert config.data.sequence_length == (64 if family == "mistral" else 256)
    assert export.main(["export", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]) == 0
    files = TensorFiles.open(tmp_path / "out")
    assert {name: files.read(name).tobytes() for name in files.kinds} == {
        name: array.tobytes() for name, array in arrays(model).items()
    }
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "out"))
    assert before == after and after["model_type"] == family


UNUSABLE: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "none": (lambda folder: None, "has no tokenizer (tokenizer.json"),
    "other files alone": (
        lambda folder: (folder / "generation_config.json").write_text("{}"),
        "has no tokenizer (tokenizer.json",
    ),
    "no eos": (
        lambda folder: (
            json_file(folder, special=["<unk>"]),
            (folder / "config.json").write_text(
                json.dumps(config_json(eos_token_id=None, pad_token_id=None))
            ),
        ),
        "has no eos to end documents with: set data.eos_id",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_tokenizer_is_a_warning(tmp_path: pathlib.Path, case: str, capsys: Any) -> None:
    source, (make, message) = write(tmp_path / "model"), UNUSABLE[case]
    make(source)
    assert import_command(source, tmp_path / "run") == 0
    stderr = capsys.readouterr().err
    assert stderr.startswith("warning: ") and message in stderr and stderr.count("\n") == 1
    assert (tmp_path / "run" / "tokenizer").exists() == ("no tokenizer (" not in message)
    assert not record.read_facts(tmp_path / "run")["rows"]


def test_special_ids_come_from_the_tokenizer_or_the_model_and_are_in_range(
    imported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = record.read_config(imported)
    model_ids = {"bos_token_id": 7, "eos_token_id": [3, 5, 380, -1, True, "a"]}
    own = tokenizer.load(imported / "tokenizer" / "tokenizer.json", bos_id=2)

    def exported_ids(loaded: Any, **changes: Any) -> tuple[list[Any], Any]:
        """([bos, eos, pad] of config.json, pad of generation_config.json)."""
        ids, pad = exporting.special_ids(config, loaded, model_ids | changes)
        return [*ids.values()], (ids | pad)["pad_token_id"]

    assert exported_ids(own, eos_token_id=5) == ([2, own.eos, own.pad], own.pad) and own.pad != own.eos
    assert own.eos == 3 and exported_ids(dataclasses.replace(own, bos=None))[0] == [7, [3, 5], own.pad]
    assert exported_ids(dataclasses.replace(own, eos=9))[0] == [2, [9, 3, 5], own.pad]
    assert exported_ids(None) == ([7, [3, 5], None], None)
    assert exported_ids(None, eos_token_id=[380], pad_token_id=-1) == ([7, None, None], None)
    assert exported_ids(dataclasses.replace(own, pad=own.eos)) == ([2, [3, 5], None], own.eos)
    assert exported_ids(dataclasses.replace(own, pad=own.eos), pad_token_id=9) == ([2, [3, 5], 9], 9)
    assert exported_ids(dataclasses.replace(own, pad=380), bos_token_id=380) == ([2, [3, 5], None], None)
    silent = {key: value for key, value in config_json().items() if not key.endswith("_token_id")}
    source = write(tmp_path / "model")
    (source / "config.json").write_text(json.dumps(silent))
    assert import_command(source, tmp_path / "run") == 0
    assert record.read_facts(tmp_path / "run")["special"] == {"bos_token_id": 1, "eos_token_id": 2}
    config.train.init_from = str(tmp_path / "run")
    special = directory.special(tmp_path / "begun", config)
    assert special == {"special": {"bos_token_id": 1, "eos_token_id": 2}}
    (tmp_path / "begun").mkdir()
    directory.begin(writer.Writer(tmp_path / "begun"), config, rows={}, **special)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "begun" / "checkpoints" / "0").mkdir(parents=True)
    assert directory.special(tmp_path / "begun", config) == special
    config.train.init_from = ""
    assert directory.special(tmp_path / "begun", config) == {}


@pytest.mark.parametrize(
    ("config_eos", "generation_eos", "expected"),
    [
        (3, [3, 40, 400, "a"], [3, 40]),
        ([40, 50], 3, [40, 50, 3]),
        (40, None, 3),
        ([40, 50], None, [3, 40, 50]),
    ],
)
def test_several_ends_survive_import_and_export_and_end_samples(
    tmp_path: pathlib.Path, config_eos: Any, generation_eos: Any, expected: Any
) -> None:
    source, run, out = write(tmp_path / "model"), tmp_path / "run", tmp_path / "out"
    json_file(source, tokenizer_config={"eos_token": "</s>"})
    config_with(eos_token_id=config_eos)(source)
    if generation_eos is not None:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation_eos}))
    assert import_command(source, run) == 0
    assert export.main(["export", f"--workdir={run}", f"--output={out}"]) == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((out / name).read_text())["eos_token_id"] == expected
    own = tokenizer.load(run / "tokenizer" / "tokenizer.json")
    ends = generate.ends_of(run, own)
    assert ends[0] == own.eos == 3 and set(ends) == {*(expected if isinstance(expected, list) else [3])}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_model_without_a_tokenizer_is_exported_bit_for_bit(
    tmp_path: pathlib.Path, dtype: str, capsys: Any
) -> None:
    tensors = arrays(dtype=exporting.DTYPES[dtype])
    write(tmp_path / "model", tensors=tensors)
    special = {"bos_token_id": 7, "eos_token_id": [3, 5], "pad_token_id": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config_json(**special)))
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    capsys.readouterr()
    args = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", f"--dtype={dtype}"]
    assert export.main(["export", *args]) == 0
    assert "was imported without a tokenizer, and is exported without one" in capsys.readouterr().err
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()).items() >= special.items()
    files = TensorFiles.open(tmp_path / "out")
    assert files.kinds == {name: (array.shape, array.dtype) for name, array in tensors.items()}
    assert all(files.read(name).tobytes() == array.tobytes() for name, array in tensors.items())
    with pytest.raises(
        ValueError, match=r"imported without a tokenizer that ends documents: put one next to"
    ):
        generate.main(["generate", args[0], "--prompt=a"])


def with_pad_at_the_end(folder: pathlib.Path, *, vocab_size: int) -> pathlib.Path:
    """A model of `vocab_size` ids whose tokenizer has "zebra" as 330 and a special <pad> as 331."""
    shutil.rmtree(folder)
    write(folder, dataclasses.replace(MODEL, vocab_size=vocab_size))
    path = json_file(folder, special=["<unk>", "<s>", "</s>"])
    raw = tokenizers.Tokenizer.from_file(str(path))
    raw.add_special_tokens(["<pad>"])
    raw.save(str(path))
    (folder / "config.json").write_text(json.dumps(config_json(vocab_size=vocab_size, eos_token_id=2)))
    assert (raw.token_to_id("zebra"), raw.token_to_id("<pad>")) == (330, 331)
    return folder


def test_pad_outside_the_vocabulary_is_replaced_by_eos(tmp_path: pathlib.Path, capsys: Any) -> None:
    source, workdir = with_pad_at_the_end(write(tmp_path / "model"), vocab_size=331), tmp_path / "run"
    (source / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    assert import_command(source, workdir) == 0
    stderr = capsys.readouterr().err
    assert "the pad '<pad>' with id 331, which the model lacks: using eos as pad" in stderr
    assert stderr.count("\n") == 1
    config = cli.parse(["train", f"--config={workdir / 'config.py'}"])[0]
    assert config.model.vocab_size == 331 and config.data.pad_id == config.data.eos_id == 2
    own = tokenizer.find(config.data.tokenizer, list, key="", eos_id=2, pad_id=2)
    assert (own.vocab_size, own.highest) == (332, 330)
    (ids,) = own.encode_documents(["a <pad> of zebra<pad>"])
    assert ids.max() == 330
    prepared.check_vocabulary(config, own)
    warm_start.find(config)
    with pytest.raises(ValueError, match=r"vocab_size is 331: set data\.tokenizer to that of train\.init"):
        prepared.check_vocabulary(config, dataclasses.replace(own, pad=331))


def test_tokenizer_without_a_fast_form_is_a_warning_at_import_and_export(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    source, workdir, out = write(tmp_path / "model"), tmp_path / "run", tmp_path / "out"
    without_fast_form = tied(source / "tokenizer.model", "bc", "ab")
    message = r"warning: tokenizer \S+ cannot be converted to tokenizer\.json: 'abc' would have the ids .*\n"
    assert import_command(source, workdir) == 0
    assert re.fullmatch(message, capsys.readouterr().err)
    assert export.main(["export", f"--workdir={workdir}", f"--output={out}"]) == 0
    assert re.fullmatch(message, capsys.readouterr().err)
    assert {path.name for path in out.iterdir() if "token" in path.name} == {"tokenizer.model"}
    assert (out / "tokenizer.model").read_bytes() == without_fast_form.path.read_bytes()
    files = TensorFiles.open(out)
    assert all(files.read(name).tobytes() == array.tobytes() for name, array in arrays().items())
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == without_fast_form.eos
    assert export.main(["export", f"--workdir={workdir}", f"--output={out}", "--overwrite"]) == 0


@pytest.mark.parametrize("adds", [None, False, True])
def test_bos_that_transformers_does_not_add_is_a_warning(
    tmp_path: pathlib.Path, adds: bool | None, capsys: Any
) -> None:
    source = write(tmp_path / "model", dataclasses.replace(MODEL, vocab_size=500))
    model = trained(CODE, kind="bpe", **LLAMA)
    (source / "tokenizer.model").write_bytes(model.SerializeToString())
    if adds is not None:
        (source / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds}))
    assert import_command(source, tmp_path / "run") == 0
    assert record.read_facts(tmp_path / "run")["rows"]["train"].get("bos") == (1 if adds else None)
    assert ("has a bos, 1, which transformers puts before no text" in capsys.readouterr().err) == (not adds)


@pytest.mark.parametrize("pad", [*(pytest.param(p, marks=pytest.mark.slow) for p in (None, "</s>")), "<pad>"])
@pytest.mark.parametrize("kind", ["bpe", pytest.param("SentencePiece", marks=pytest.mark.slow)])
def test_pad_stays_what_it_is_when_an_export_is_imported_and_exported(
    tmp_path: pathlib.Path, kind: str, pad: str | None
) -> None:
    source = write(tmp_path / "model", dataclasses.replace(MODEL, vocab_size=500))
    config_with(vocab_size=500, pad_token_id=None, eos_token_id=2)(source)
    if kind == "SentencePiece":
        model = trained(CODE, kind="bpe", **LLAMA)
        (source / "tokenizer.model").write_bytes(model.SerializeToString())
        (source / "added_tokens.json").write_text("{}")
        config: dict[str, Any] = {"pad_token": {"</s>": pad, "<pad>": "<unk>"}[pad]} if pad else {}
    else:
        json_file(source, special=["<unk>", "<s>", "</s>", *(["<pad>"] if pad == "<pad>" else [])])
        config = {"pad_token": pad} if pad else {}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    exports = []
    for n in (1, 2, 3):
        run, out = tmp_path / f"run{n}", tmp_path / f"out{n}"
        assert import_command(source, run) == 0
        assert export.main(["export", f"--workdir={run}", f"--output={out}"]) == 0
        exports.append({path.name: path.read_bytes() for path in out.iterdir() if path.name != FILE})
        source = out
    assert exports[0] == exports[1] == exports[2]
    assert json.loads(exports[0]["tokenizer_config.json"]).get("pad_token") == config.get("pad_token")


def config_with(text: str | None = None, **changes: Any) -> Callable[[pathlib.Path], Any]:
    """Writes a config.json with another text or other values."""
    return lambda folder: (folder / "config.json").write_text(text or json.dumps(config_json(**changes)))


def tensors_with(
    change: Callable[[dict[str, np.ndarray]], Any], model: ModelConfig = MODEL
) -> Callable[[pathlib.Path], Any]:
    """Writes other tensors with the same config.json."""

    def make(folder: pathlib.Path) -> None:
        tensors = arrays(model)
        change(tensors)
        shutil.rmtree(folder)
        write(folder, model, tensors)

    return make


def zeros(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


Q = "model.layers.1.self_attn.q_proj.weight"
UNSUPPORTED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "no directory": (shutil.rmtree, "has no config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a config that is a directory": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "has no config.json",
    ),
    "a config that is not JSON": (config_with("llama"), "config.json is truncated or invalid"),
    "a config cut short": (config_with('{"model_type": "lla'), "config.json is truncated or invalid"),
    "a config that is a list": (config_with("[]"), "config.json is not a JSON object"),
    "a config of deep brackets": (config_with("[" * 10**5), "config.json is truncated or invalid"),
    "a config with a name twice": (
        config_with('{"hidden_size": 16, "hidden_size": 99999}'),
        "duplicate key 'hidden_size'",
    ),
    "a config of 2 MB": (config_with(" " * 2**21), "has 2,097,152 bytes"),
    "a number of 100,000 digits": (
        config_with('{"hidden_size": ' + "9" * 10**5 + "}"),
        "truncated or invalid",
    ),
    "another architecture": (config_with(model_type="mistral"), "of type 'mistral'"),
    "another head": (config_with(architectures=["LlamaForTokenClassification"]), "only llama"),
    "biases": (config_with(attention_bias=True), "attention_bias = True"),
    "another activation": (config_with(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "a text for a number": (config_with(hidden_size="16"), "hidden_size = '16'"),
    "a text without end": (config_with(hidden_act="x" * 10**5), "hidden_act = 'xxx"),
    "frequencies that are not finite": (
        config_with(
            rope_theta=1.0,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        "rope_theta 1.0 and yarn(4.0, 64.0, 32.0, 1.0, 1.138629436111989) give no finite frequencies",
    ),
    "frequencies that overflow": (
        config_with(rope_scaling={"rope_type": "dynamic", "factor": 2**63}),
        "give no finite frequencies",
    ),
    "a negative number": (config_with(num_hidden_layers=-2), "num_hidden_layers = -2"),
    "more layers than are counted": (config_with(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "more layers than the file": (
        config_with(num_hidden_layers=2_000),
        "'model.layers.2.self_attn.q_proj.weight', 'model.layers.2.self_attn.k_proj.weight'",
    ),
    "enormous widths": (
        config_with(vocab_size=2**31 - 1, hidden_size=2**30, intermediate_size=2**31 - 1),
        "'model.embed_tokens.weight' has shape [380, 16], expected [2147483647, 1073741824]",
    ),
    "positions too long to count": (config_with(max_position_embeddings=10**12), "max_position_embeddings"),
    "fewer layers than the file": (
        config_with(num_hidden_layers=1),
        "'model.layers.1.input_layernorm.weight', 'model.layers.1.mlp.down_proj.weight', ",
    ),
    "other heads": (
        config_with(num_key_value_heads=1),
        "k_proj.weight' has shape [8, 16], expected [4, 16]",
    ),
    "a missing tensor": (tensors_with(lambda t: t.pop(Q)), f"does not match the tensors: missing {Q!r}"),
    "a missing head": (tensors_with(lambda t: t.pop(HEAD)), "missing 'lm_head.weight'"),
    "a surplus tensor": (
        tensors_with(zeros("model.layers.0.self_attn.q_proj.bias", 16)),
        "unexpected 'model.layers.0.self_attn.q_proj.bias'",
    ),
    "another shape": (
        tensors_with(zeros(Q, 16, 15)),
        "[16, 15], expected",
    ),
    "a transposed tensor": (
        tensors_with(zeros("model.layers.0.mlp.up_proj.weight", 16, 24)),
        "has shape [16, 24], expected [24, 16]",
    ),
    "a head that is not tied": (
        tensors_with(zeros(HEAD, 380, 16), TIED),
        "lm_head.weight differs from model.embed_tokens.weight: set tie_word_embeddings to false",
    ),
    "a tied head without embeddings": (
        tensors_with(
            lambda t: t.update({HEAD: t.pop("model.embed_tokens.weight")}),
            TIED,
        ),
        "missing 'model.embed_tokens.weight'",
    ),
    "a head that only the index has": (
        lambda folder: (tensors_with(lambda t: t.pop(HEAD))(folder), index_with(HEAD)(folder)),
        "a.safetensors has no tensor 'lm_head.weight', which model.safetensors.index.json expects in it",
    ),
    "a tied head of one number": (tensors_with(zeros(HEAD), TIED), "lm_head.weight differs"),
    "a tied head of another shape": (
        tensors_with(zeros(HEAD, 16, 380), TIED),
        "lm_head.weight differs",
    ),
    "no tensors": (lambda folder: (folder / FILE).unlink(), f"has no {FILE}"),
    "a pickle": (
        lambda folder: ((folder / FILE).unlink(), (folder / "pytorch_model.bin").touch()),
        "safe_serialization=True",
    ),
    "a file cut short": (
        lambda folder: os.truncate(folder / FILE, (folder / FILE).stat().st_size - 1),
        "model.safetensors is truncated or invalid",
    ),
    "a shard that is missing": (
        lambda folder: (
            (folder / FILE).rename(folder / "model-00001-of-00002.safetensors"),
            (folder / INDEX).write_text(json.dumps({"weight_map": {Q: "model-00002-of-00002.safetensors"}})),
        ),
        "model-00002-of-00002.safetensors' is missing",
    ),
    "an empty tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not a valid tokenizer.json",
    ),
    "a piece of texts beyond the model": (
        lambda folder: with_pad_at_the_end(folder, vocab_size=330),
        "tokenizer.json has the id 330 ('zebra'), but the model has 330 embeddings: remove it",
    ),
    "an eos beyond the model": (
        lambda folder: (
            with_pad_at_the_end(folder, vocab_size=331),
            (folder / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}'),
        ),
        "has the id 331 ('<pad>'), but the model has 331 embeddings: remove it",
    ),
    "a tokenizer whose settings are a list": (
        lambda folder: (json_file(folder), (folder / "tokenizer_config.json").write_text("[]")),
        "tokenizer_config.json, which defines a tokenizer's special tokens, is not a JSON object",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_model_is_reported_in_one_line_and_nothing_is_written(
    tmp_path: pathlib.Path, case: str, capsys: Any
) -> None:
    source = write(tmp_path / "model")
    make, message = UNSUPPORTED[case]
    make(source)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert message in error_line(capsys, source, tmp_path / "runs" / "run")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


NOT_FINITE: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "a weight that is NaN": (
        tensors_with(lambda t: t[Q].__setitem__((3, 5), np.nan)),
        f"1 of the 256 weights of {Q!r} are NaN or infinite, the first at [3, 5]: download the file again",
    ),
    "weights that are infinite": (
        tensors_with(lambda t: t["model.norm.weight"].__setitem__([1, 4], [np.inf, -np.inf])),
        "2 of the 16 weights of 'model.norm.weight' are NaN or infinite, the first at [1]",
    ),
    "a tied embedding that is NaN": (
        tensors_with(
            lambda t: (
                t["model.embed_tokens.weight"].__setitem__((379, 0), np.nan),
                t.update({HEAD: t["model.embed_tokens.weight"]}),
            ),
            TIED,
        ),
        "1 of the 6,080 weights of 'model.embed_tokens.weight' are NaN or infinite, the first at [379, 0]",
    ),
}


@pytest.mark.parametrize("case", NOT_FINITE)
def test_weight_that_is_not_finite_is_named_and_nothing_is_written(
    tmp_path: pathlib.Path, case: str, capsys: Any
) -> None:
    source = write(tmp_path / "model")
    make, message = NOT_FINITE[case]
    make(source)
    assert import_command(source, tmp_path / "run") == errors.BAD_SETTING
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {source}: ") and message in line
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_import_replaces_only_an_older_import_and_only_with_overwrite(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    source, workdir = write(tmp_path / "model"), tmp_path / "run"
    assert import_command(source, workdir) == 0
    weights = variables_of(workdir, 0)
    write(shutil.rmtree(source) or source, tensors=arrays(dtype=np.float16))
    capsys.readouterr()
    assert "is not empty: choose another path, or replace it with --overwrite" in error_line(
        capsys, source, workdir
    )
    assert import_command(source, workdir, "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert all(np.array_equal(array, weights[path]) for path, array in variables_of(workdir, 0).items())
    capsys.readouterr()
    (workdir / "metrics.jsonl").touch()  # as after training in it
    assert "is not empty and holds 'metrics.jsonl'" in error_line(capsys, source, workdir, "--overwrite")
    for args, message in (
        ([f"--output={tmp_path / 'a:b'}"], "has a colon"),
        ([f"--output={tmp_path / 'a[1]' / 'run'}"], "cannot be read back from a path with '['"),
        (["--output=x", "more"], "unrecognized arguments: more"),
        ([], "--output"),
    ):
        with pytest.raises(SystemExit):
            cli.main(import_hf.main, None, ["import_hf", f"--input={source}", *args])
        assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "run"}


def test_import_that_cannot_be_read_back_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def wait(self: Checkpoints) -> None:
        original(self)
        for file in tmp_path.glob(".run.partial/checkpoints/0/state/**/d/*"):
            file.write_bytes(bytes(file.stat().st_size))

    original = Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "wait", wait)
    assert import_command(write(tmp_path / "model"), tmp_path / "run") == errors.NO_DATA
    assert "the save failed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_no_run_trains_in_the_workdir_of_an_import(imported: pathlib.Path) -> None:
    for arm in ("full", "relora"):
        config = cli.parse(["train", f"--config={imported / 'config.py'}:{arm}"])[0]
        with pytest.raises(ValueError, match=r"holds a run with another config.*use another --workdir"):
            directory.check(imported, config)


@pytest.mark.slow
def test_full_disk_leaves_no_partial_run(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "model", dataclasses.replace(MODEL, vocab_size=40_000))
    code = (
        "import resource, sys; from relora_jax import cli as flags, import_hf\n"
        "for limit in (1024, 20_480, 300_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        f"    args = ['x', '--input={source}', '--output={tmp_path / 'run'}']\n"
        "    try: flags.main(import_hf.main, None, args)\n"
        "    except SystemExit as stop: print(stop.code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(errors.NO_DATA)] * 3, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 3 and all("File too large" in line for line in lines), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_imported_model_trains_on_user_text_only_with_its_own_tokenizer(
    imported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(300)))
    json_file(tmp_path / "other", special=[*SPECIAL, "<x>"])
    short = ("updates=6", "batch=8", "evaluate_every_updates=6", "eval_tokens=500")
    phase = ("cycle_updates=2", "warm_up_updates=1", "restart_warm_up_updates=1", "peak_lr=0.01")
    args = [f"--config={imported / 'config.py'}", f"--text={text}", "--config.data.sequence_length=16"]
    args += [f"--config.train.{word}" for word in short] + [f"--config.relora.{word}" for word in phase]
    args += ["--config.data.validation_fraction=0.2"]
    # of both commands: other compiler options change the last digit of a loss
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "relora_jax.train", *args, f"--workdir={tmp_path / 'run'}", *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    other = train(f"--config.data.tokenizer={tmp_path / 'other'}", "--config.data.eos_id=-1")
    assert other.returncode == 2 and "was trained with another tokenizer" in other.stderr, other.stderr
    ended = train()
    assert ended.returncode == 0, ended.stderr
    assert f"starts at update 0 from {imported}" in ended.stdout
    rows = record.read(tmp_path / "run").points("eval", "perplexity")
    assert [u for u, _ in rows] == [0, 6] and rows[1][1] < rows[0][1]

    (tmp_path / "elsewhere").mkdir()
    large = tmp_path / "large.jsonl"
    large.write_text(text.read_text() * 40)
    moved = text.rename(tmp_path / "elsewhere" / text.name)
    for workdir, moved_text, expected in ((tmp_path / "run", moved, rows[1][1]), (imported, large, None)):
        command = [sys.executable, "-m", "relora_jax.evaluate", f"--workdir={workdir}", "--json"]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
        result = subprocess.run(
            [*command, f"--text={moved_text}"], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        assert expected is None or json.loads(result.stdout)["perplexity"] == pytest.approx(
            expected, rel=1e-6
        )
