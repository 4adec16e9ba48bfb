"""A checkpoint of transformers, made here by hand, becomes a run to begin with, or nothing is written."""

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

from relora_jax import cli, errors, evaluate, export, generate, import_hf
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
from tests.support.tokenizers import SPECIAL, json_file, tied

MODEL = dataclasses.replace(
    small.config().model, vocab_size=380, rope_scaling="llama3(8.0, 1.0, 4.0, 64.0)", max_positions=256
)
TIED = dataclasses.replace(MODEL, tied_embeddings=True)
COMPUTED = "model.layers.0.self_attn.rotary_emb.inv_freq"


def arrays(model: ModelConfig = MODEL, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Tensors of the model by their names there, with values that all three types hold."""
    rng = np.random.default_rng(0)
    places = llama_hf.tensors(model).items()
    return {name: (rng.integers(-99, 99, at.shape) / 64).astype(dtype) for name, at in places}


def facts(model: ModelConfig = MODEL, **changes: Any) -> dict[str, Any]:
    special = {"bos_token_id": None, "eos_token_id": 3, "pad_token_id": 1}
    return llama_hf.to_config(model, length=256, dtype="float32", special=special) | changes


def write(
    folder: pathlib.Path, model: ModelConfig = MODEL, tensors: dict[str, np.ndarray] | None = None, **how: Any
) -> pathlib.Path:
    """The directory of a model without a tokenizer."""
    tensors = arrays(model) if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(facts(model)))
    write_tensors(folder, tensors, **how)
    return folder


def refused(capsys: Any, source: pathlib.Path, place: pathlib.Path, *words: str) -> str:
    """The one line that the command ends in."""
    assert import_command(source, place, *words) == errors.BAD_SETTING
    said = capsys.readouterr().err.strip()
    assert said.startswith("error: ") and "\n" not in said and said.isprintable() and len(said) < 2100, said
    return said


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A RUN of the toy model with a tokenizer, whose files the model's directory holds as links."""
    folder = tmp_path_factory.mktemp("imported")
    json_file(folder / "blobs", tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>"})
    source = write(folder / "model", shard_bytes=9_000)
    for path in (folder / "blobs").iterdir():
        (source / path.name).symlink_to(f"../blobs/{path.name}")
    assert import_command(source, folder / "run") == 0
    assert len(list(source.glob("*.safetensors"))) > 3
    return folder / "run"


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_tensor_is_in_its_place_bit_for_bit(tmp_path: pathlib.Path, dtype: Any) -> None:
    tensors = arrays(dtype=dtype)
    write(tmp_path / "model", tensors=tensors)
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    assert updates_saved(tmp_path / "run") == [0]
    found = variables_of(tmp_path / "run", 0)
    for name, at in llama_hf.tensors(MODEL).items():
        array = found[at.path] if at.layer is None else found[at.path][at.layer]
        expected = tensors[name].astype(np.float32)
        assert array.dtype == np.float32
        assert np.array_equal(array.T if at.transposed else array, expected), name
    config = cli.parse(["train", f"--config={tmp_path / 'run' / 'config.py'}"])[0]
    assert config.model.compute_dtype == ("float32" if dtype == np.float32 else "bfloat16")
    assert record.read_config(tmp_path / "run").model.compute_dtype == "float32"


@pytest.mark.parametrize("arm", ["full", "lora", "lora_warm", "relora"])
def test_config_to_begin_with_is_valid_in_every_arm(imported: pathlib.Path, arm: str) -> None:
    made = cli.parse(["train", f"--config={imported / 'config.py'}:{arm}"])[0]
    assert (made.model, made.arm, made.train.init_from) == (MODEL, arm, str(imported))
    assert made.data.tokenizer == str(imported / "tokenizer") and made.data.text == made.data.dataset == ""
    for devices in (1, 2, 4, 8):
        validate(made, devices=devices)
    cycle, updates = made.relora.cycle_updates, made.train.updates
    assert made.relora.warm_start_updates == 0 and (updates - 1) // cycle == 3  # restarts
    warm_start.find(made)


def test_control_of_an_imported_model_is_refused(imported: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match="no smaller control: take the arm full"):
        cli.parse(["train", f"--config={imported / 'config.py'}:control"])


def test_config_is_valid_for_models_of_any_shape(tmp_path: pathlib.Path) -> None:
    shape = {"hidden": 4096, "mlp": 14336, "layers": 32, "heads": 32, "head_dim": 128}
    for n, changes in enumerate(
        (
            {**shape, "kv_heads": 8, "max_positions": 131_072},
            {"hidden": 2, "mlp": 1, "heads": 1, "kv_heads": 1, "head_dim": 2, "max_positions": 1},
            {"rope_theta": 5e5, "rms_eps": 1e-5, "max_positions": 0},
        )
    ):
        place = tmp_path / f"a 'run' \"{n}\" \\x41"
        place.mkdir()
        model = dataclasses.replace(MODEL, **changes)
        (place / "config.py").write_text(starting_config.text(model, place, source='the """ model\n\\'))
        facts = {"compute_dtype": "bfloat16", "rows": {"train": {"eos": 3}}}
        (place / "run.json").write_text(json.dumps(facts))
        begun = starting_config.of_model(model, str(place), "full", compute_dtype="float32", ids={})
        (place / "config.json").write_text(to_json(begun))
        made = cli.parse(["train", f"--config={place / 'config.py'}"])[0]
        validate(made, devices=8)
        assert made.train.init_from == str(place) and made.name == place.name and made.data.eos_id == 3
        large = model.hidden == 4096
        assert made.model == dataclasses.replace(
            model, compute_dtype="bfloat16", remat="full" if large else "none"
        )
        assert made.relora.rank == (128 if large else 1 if model.hidden == 2 else 4)
        assert made.data.sequence_length == min(1024, model.max_positions or 1024)


def test_run_is_the_model_itself_in_float32(imported: pathlib.Path) -> None:
    config, told = record.read_config(imported), record.read_facts(imported)
    assert (config.model, config.arm, config.train.init_from) == (MODEL, "full", "")
    own = tokenizer.load(imported / "tokenizer" / "tokenizer.json")
    bos = tokenizer.begins(own.path)
    assert told["rows"] == {"train": {"tokenizer": own.sha256, "eos": own.eos, "pad": own.pad, "bos": bos}}
    assert (config.data.eos_id, config.data.pad_id, config.data.bos_id) == (own.eos, own.pad, bos)
    assert told["imported_from"] == str(imported.parent / "model") and "unigram_perplexity" not in told
    assert not any(path.is_symlink() for path in imported.rglob("*"))
    names = {pattern.partition("/")[0] for pattern in importing.OURS}
    assert {path.name for path in imported.iterdir()} == names | {atomic.MARK}
    assert {path.name for path in (imported / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_run_takes_the_imported_tokenizer(imported: pathlib.Path) -> None:
    made = cli.parse(["train", f"--config={imported / 'config.py'}"])[0]
    own = record.read_facts(imported)["rows"]
    warm_start.check_tokenizer(made, own)
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        warm_start.check_tokenizer(made, {"train": {**own["train"], "tokenizer": "another"}})


def test_a_run_that_was_moved_has_its_tokenizer_with_it_or_is_told_where(
    imported: pathlib.Path, tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing lies
    place = pathlib.Path(shutil.copytree(imported, tmp_path / "run"))
    config = record.read_config(place)
    config.data.tokenizer = "runs/before/tokenizer"
    (place / "config.json").write_text(to_json(config))
    assert restored.tokenizer_of(place, config, "").path == place / "tokenizer" / "tokenizer.json"
    (place / "tokenizer").rename(tmp_path / "moved")
    json_file(tmp_path / "other", special=[*SPECIAL, "<x>"])

    def said(made: Any, *words: str) -> str:
        words = f"--workdir={place}", *words, *([f"--output={tmp_path / 'out'}"] if made is export else [])
        with pytest.raises(SystemExit) as stop:
            cli.main(made.main, made.__doc__, ["a command", *words])
        assert stop.value.code == (0 if (tmp_path / "out").exists() else errors.BAD_SETTING)
        return capsys.readouterr().err

    for made in (evaluate, generate, export):
        assert "'runs/before/tokenizer', and none is there: say where by --tokenizer=PATH" in said(made)
        assert "was trained with another tokenizer than other" in said(made, "--tokenizer=other")
        assert "tokenizer 'gone' is no file" in said(made, "--tokenizer=gone")
    assert said(export, "--tokenizer=moved") == ""
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_run_begins_with_the_imported_weights(imported: pathlib.Path) -> None:
    made = cli.parse(["train", f"--config={imported / 'config.py'}"])[0]
    program = Program(made, small.mesh())
    state = warm_start.load(warm_start.find(made), program)
    begun = flatten(state)
    for path, array in variables_of(imported, 0).items():
        assert np.array_equal(begun[f"trained/{path}"], array), path
    assert int(state.update) == 0 and not any(np.asarray(x).any() for x in state.tokens_seen)


def test_what_follows_from_the_rest_may_be_among_the_tensors(tmp_path: pathlib.Path) -> None:
    tensors = arrays(TIED, dtype=ml_dtypes.bfloat16)
    embeddings = tensors["model.embed_tokens.weight"]
    embeddings[0, 0] = np.nan  # is itself
    more = {"lm_head.weight": embeddings, COMPUTED: np.ones(2, np.float32)}
    write(tmp_path / "model", TIED, tensors | more)
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    found = variables_of(tmp_path / "run", 0)["embed/embedding"]
    assert np.array_equal(found, embeddings.astype(np.float32), equal_nan=True)
    config = cli.parse(["train", f"--config={tmp_path / 'run' / 'config.py'}"])[0]
    assert config.model.compute_dtype == "bfloat16"  # the model's tensors are


USELESS: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "none": (lambda folder: None, "has no tokenizer (tokenizer.json"),
    "other files alone": (
        lambda folder: (folder / "generation_config.json").write_text("{}"),
        "has no tokenizer (tokenizer.json",
    ),
    "no eos": (
        lambda folder: (
            json_file(folder, special=["<unk>"]),
            (folder / "config.json").write_text(json.dumps(facts(eos_token_id=None, pad_token_id=None))),
        ),
        "has no eos to end documents with: give its id as data.eos_id",
    ),
}


@pytest.mark.parametrize("what", USELESS)
def test_a_tokenizer_that_is_of_no_use_is_told_in_a_warning(
    tmp_path: pathlib.Path, what: str, capsys: Any
) -> None:
    source, (make, told) = write(tmp_path / "model"), USELESS[what]
    make(source)
    assert import_command(source, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert said.startswith("warning: ") and told in said and said.count("\n") == 1
    assert (tmp_path / "run" / "tokenizer").exists() == ("no tokenizer (" not in told)
    assert not record.read_facts(tmp_path / "run")["rows"]


def test_special_ids_are_the_tokenizers_else_the_models_and_none_beyond_it(
    imported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config, told = (
        record.read_config(imported),
        {"bos_token_id": 7, "eos_token_id": [3, 5, 380, -1, True, "a"]},
    )
    own = tokenizer.load(imported / "tokenizer" / "tokenizer.json", bos_id=2)

    def found(made: Any, **special: Any) -> tuple[list[Any], Any]:
        """Of config.json bos, eos and pad, and the pad of generation_config.json."""
        ids, more = exporting.special_ids(config, made, told | special)
        return [*ids.values()], (ids | more)["pad_token_id"]

    assert found(own) == ([2, own.eos, own.pad], own.pad) and own.pad != own.eos
    assert found(dataclasses.replace(own, bos=None))[0] == [7, own.eos, own.pad]
    assert found(None) == ([7, [3, 5], None], None)
    assert found(None, eos_token_id=[380], pad_token_id=-1) == ([7, None, None], None)
    assert found(dataclasses.replace(own, pad=own.eos)) == ([2, own.eos, None], own.eos)
    assert found(dataclasses.replace(own, pad=own.eos), pad_token_id=9) == ([2, own.eos, 9], 9)
    assert found(dataclasses.replace(own, pad=380), bos_token_id=380) == ([2, own.eos, None], None)
    silent = {key: value for key, value in facts().items() if not key.endswith("_token_id")}
    source = write(tmp_path / "model")
    (source / "config.json").write_text(json.dumps(silent))
    assert import_command(source, tmp_path / "run") == 0
    assert record.read_facts(tmp_path / "run")["special"] == {"bos_token_id": 1, "eos_token_id": 2}
    config.train.init_from = str(tmp_path / "run")
    began = directory.special(tmp_path / "begun", config)
    assert began == {"special": {"bos_token_id": 1, "eos_token_id": 2}}
    (tmp_path / "begun").mkdir()
    directory.begin(writer.Writer(tmp_path / "begun"), config, rows={}, **began)
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "begun" / "checkpoints" / "0").mkdir(parents=True)
    assert directory.special(tmp_path / "begun", config) == began
    config.train.init_from = ""
    assert directory.special(tmp_path / "begun", config) == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_a_tokenizer_a_model_still_comes_out_bit_for_bit(
    tmp_path: pathlib.Path, dtype: str, capsys: Any
) -> None:
    tensors = arrays(dtype=exporting.DTYPES[dtype])
    write(tmp_path / "model", tensors=tensors)
    special = {"bos_token_id": 7, "eos_token_id": [3, 5], "pad_token_id": 1}
    (tmp_path / "model" / "config.json").write_text(json.dumps(facts(**special)))
    assert import_command(tmp_path / "model", tmp_path / "run") == 0
    capsys.readouterr()
    words = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", f"--dtype={dtype}"]
    assert export.main(["export", *words]) == 0
    assert "was imported without a tokenizer, and is exported without one" in capsys.readouterr().err
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()).items() >= special.items()
    found = TensorFiles.open(tmp_path / "out")
    assert found.kinds == {name: (array.shape, array.dtype) for name, array in tensors.items()}
    assert all(found.read(name).tobytes() == array.tobytes() for name, array in tensors.items())
    with pytest.raises(ValueError, match=r"imported without a tokenizer that ends documents: put one beside"):
        generate.main(["generate", words[0], "--prompt=a"])


def with_pad_at_the_end(folder: pathlib.Path, *, vocabulary: int) -> pathlib.Path:
    """A model of so many ids, whose tokenizer has "zebra" as 330, and as 331 a special <pad>."""
    shutil.rmtree(folder)
    write(folder, dataclasses.replace(MODEL, vocab_size=vocabulary))
    path = json_file(folder, special=["<unk>", "<s>", "</s>"])
    made = tokenizers.Tokenizer.from_file(str(path))
    made.add_special_tokens(["<pad>"])
    made.save(str(path))
    (folder / "config.json").write_text(json.dumps(facts(vocab_size=vocabulary, eos_token_id=2)))
    assert (made.token_to_id("zebra"), made.token_to_id("<pad>")) == (330, 331)
    return folder


def test_a_pad_beyond_the_model_gives_way_to_eos_and_the_run_begins(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    source, place = with_pad_at_the_end(write(tmp_path / "model"), vocabulary=331), tmp_path / "run"
    (source / "tokenizer_config.json").write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    assert import_command(source, place) == 0
    said = capsys.readouterr().err
    assert "'<pad>', is the id 331, which the model lacks: eos is the pad" in said and said.count("\n") == 1
    config = cli.parse(["train", f"--config={place / 'config.py'}"])[0]
    assert config.model.vocab_size == 331 and config.data.pad_id == config.data.eos_id == 2
    own = tokenizer.find(config.data.tokenizer, list, key="", eos_id=2, pad_id=2)
    assert (own.vocab_size, own.highest) == (332, 330)
    (ids,) = own.encode_documents(["a <pad> of zebra<pad>"])
    assert ids.max() == 330
    prepared.check_vocabulary(config, own)
    warm_start.find(config)
    with pytest.raises(ValueError, match=r"vocab_size is 331: take that of train\.init_from as data\.tokeni"):
        prepared.check_vocabulary(config, dataclasses.replace(own, pad=331))


def test_a_tokenizer_without_a_fast_form_is_told_at_once_and_keeps_no_weights_back(
    tmp_path: pathlib.Path, capsys: Any
) -> None:
    source, place, out = write(tmp_path / "model"), tmp_path / "run", tmp_path / "out"
    without_fast_form = tied(source / "tokenizer.model", "bc", "ab")
    told = r"warning: tokenizer \S+ cannot become a tokenizer\.json: 'abc' would have the ids .*\n"
    assert import_command(source, place) == 0
    assert re.fullmatch(told, capsys.readouterr().err)
    assert export.main(["export", f"--workdir={place}", f"--output={out}"]) == 0
    assert re.fullmatch(told, capsys.readouterr().err)
    assert {path.name for path in out.iterdir() if "token" in path.name} == {"tokenizer.model"}
    assert (out / "tokenizer.model").read_bytes() == without_fast_form.path.read_bytes()
    found = TensorFiles.open(out)
    assert all(found.read(name).tobytes() == array.tobytes() for name, array in arrays().items())
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == without_fast_form.eos
    assert export.main(["export", f"--workdir={place}", f"--output={out}", "--overwrite"]) == 0


def config_with(text: str | None = None, **changes: Any) -> Callable[[pathlib.Path], Any]:
    """A config.json of another text, or of other values."""
    return lambda folder: (folder / "config.json").write_text(text or json.dumps(facts(**changes)))


def tensors_with(
    change: Callable[[dict[str, np.ndarray]], Any], model: ModelConfig = MODEL
) -> Callable[[pathlib.Path], Any]:
    """Other tensors under the same config.json."""

    def make(folder: pathlib.Path) -> None:
        made = arrays(model)
        change(made)
        shutil.rmtree(folder)
        write(folder, model, made)

    return make


def zeros(name: str, *shape: int) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: np.zeros(shape, np.float32)})


Q, HEAD = "model.layers.1.self_attn.q_proj.weight", "lm_head.weight"
REFUSED: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "no directory": (shutil.rmtree, "has no config.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "a config that is a directory": (
        lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
        "has no config.json",
    ),
    "a config that is no JSON": (config_with("llama"), "config.json is not whole"),
    "a config cut short": (config_with('{"model_type": "lla'), "config.json is not whole"),
    "a config that is a list": (config_with("[]"), "config.json is no JSON object"),
    "a config of deep brackets": (config_with("[" * 10**5), "config.json is not whole"),
    "a config with a name twice": (
        config_with('{"hidden_size": 16, "hidden_size": 99999}'),
        "'hidden_size' twice",
    ),
    "a config of 2 MB": (config_with(" " * 2**21), "has 2,097,152 bytes"),
    "a number of 100,000 digits": (config_with('{"hidden_size": ' + "9" * 10**5 + "}"), "is not whole"),
    "another architecture": (config_with(model_type="mistral"), "is of a 'mistral'"),
    "another head": (config_with(architectures=["LlamaForTokenClassification"]), "only llama"),
    "biases": (config_with(attention_bias=True), "attention_bias = True"),
    "another activation": (config_with(hidden_act="gelu"), "hidden_act = 'gelu'"),
    "a text for a number": (config_with(hidden_size="16"), "hidden_size = '16'"),
    "a text without end": (config_with(hidden_act="x" * 10**5), "hidden_act = 'xxx"),
    "angles of nothing": (
        config_with(
            rope_theta=1.0,
            rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        "rope_theta 1.0 and yarn(4.0, 64.0, 32.0, 1.0, 1.138629436111989) give no angles",
    ),
    "angles without end": (
        config_with(rope_scaling={"rope_type": "dynamic", "factor": 2**63}),
        "give no angles",
    ),
    "a negative number": (config_with(num_hidden_layers=-2), "num_hidden_layers = -2"),
    "more layers than are counted": (config_with(num_hidden_layers=10**9), "num_hidden_layers = 1000000000"),
    "more layers than the file": (
        config_with(num_hidden_layers=2_000),
        "'model.layers.2.self_attn.q_proj.weight', 'model.layers.2.self_attn.k_proj.weight'",
    ),
    "enormous widths": (
        config_with(vocab_size=2**31 - 1, hidden_size=2**30, intermediate_size=2**31 - 1),
        "'model.embed_tokens.weight' has the shape [380, 16], where [2147483647, 1073741824] is due",
    ),
    "positions too long to count": (config_with(max_position_embeddings=10**12), "max_position_embeddings"),
    "fewer layers than the file": (
        config_with(num_hidden_layers=1),
        "'model.layers.1.input_layernorm.weight', 'model.layers.1.mlp.down_proj.weight', ",
    ),
    "other heads": (
        config_with(num_key_value_heads=1),
        "k_proj.weight' has the shape [8, 16], where [4, 16]",
    ),
    "a missing tensor": (tensors_with(lambda t: t.pop(Q)), f"with its tensors: {Q!r} is missing"),
    "a missing head": (tensors_with(lambda t: t.pop(HEAD)), "'lm_head.weight' is missing"),
    "a surplus tensor": (
        tensors_with(zeros("model.layers.0.self_attn.q_proj.bias", 16)),
        "'model.layers.0.self_attn.q_proj.bias' has no place in the model",
    ),
    "another shape": (
        tensors_with(zeros(Q, 16, 15)),
        "[16, 15], where",
    ),
    "a transposed tensor": (
        tensors_with(zeros("model.layers.0.mlp.up_proj.weight", 16, 24)),
        "has the shape [16, 24], where [24, 16] is due",
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
        "'model.embed_tokens.weight' is missing",
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
        "model.safetensors is not whole",
    ),
    "a shard that is missing": (
        lambda folder: (
            (folder / FILE).rename(folder / "model-00001-of-00002.safetensors"),
            (folder / INDEX).write_text(json.dumps({"weight_map": {Q: "model-00002-of-00002.safetensors"}})),
        ),
        "model-00002-of-00002.safetensors' is missing",
    ),
    "a tokenizer that is none": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json is no tokenizer.json",
    ),
    "a piece of texts beyond the model": (
        lambda folder: with_pad_at_the_end(folder, vocabulary=330),
        "tokenizer.json gives the id 330 ('zebra'), and the model knows 330: take it out of the file, or ",
    ),
    "an eos beyond the model": (
        lambda folder: (
            with_pad_at_the_end(folder, vocabulary=331),
            (folder / "tokenizer_config.json").write_text('{"eos_token": "<pad>"}'),
        ),
        "gives the id 331 ('<pad>'), and the model knows 331: take it out of the file, or give it a row",
    ),
    "a tokenizer whose settings are none": (
        lambda folder: (json_file(folder), (folder / "tokenizer_config.json").write_text("[]")),
        "tokenizer_config.json, which tells",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_imported_is_named_in_one_line_and_nothing_written(
    tmp_path: pathlib.Path, what: str, capsys: Any
) -> None:
    source = write(tmp_path / "model")
    make, told = REFUSED[what]
    make(source)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert told in refused(capsys, source, tmp_path / "runs" / "run")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


def test_a_place_that_holds_something_is_left_alone(tmp_path: pathlib.Path, capsys: Any) -> None:
    source, place = write(tmp_path / "model"), tmp_path / "run"
    assert import_command(source, place) == 0
    weights = variables_of(place, 0)
    write(shutil.rmtree(source) or source, tensors=arrays(dtype=np.float16))
    capsys.readouterr()
    assert "is not empty: name another place, or replace it with --overwrite" in refused(
        capsys, source, place
    )
    assert import_command(source, place, "--overwrite") == 0
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert all(np.array_equal(array, weights[path]) for path, array in variables_of(place, 0).items())
    capsys.readouterr()
    (place / "metrics.jsonl").touch()  # a run that has trained there
    assert "is not empty and holds 'metrics.jsonl'" in refused(capsys, source, place, "--overwrite")
    for words, told in (
        ([f"--output={tmp_path / 'a:b'}"], "a colon"),
        (["--output=x", "more"], "unrecognized arguments: more"),
        ([], "--output"),
    ):
        with pytest.raises(SystemExit):
            cli.main(import_hf.main, None, ["import_hf", f"--input={source}", *words])
        assert told in capsys.readouterr().err


def test_nothing_trains_in_the_place_of_an_import(imported: pathlib.Path) -> None:
    for arm in ("full", "relora"):
        config = cli.parse(["train", f"--config={imported / 'config.py'}:{arm}"])[0]
        with pytest.raises(ValueError, match=r"holds a run of another config.*take another --workdir"):
            directory.check(imported, config)


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_run(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path / "model", dataclasses.replace(MODEL, vocab_size=40_000))
    code = (
        "import resource, sys; from relora_jax import cli as flags, import_hf\n"
        "for limit in (1024, 20_480, 300_000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        f"    words = ['x', '--input={source}', '--output={tmp_path / 'run'}']\n"
        "    try: flags.main(import_hf.main, None, words)\n"
        "    except SystemExit as stop: print(stop.code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == [str(errors.NO_DATA)] * 3, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 3 and all("File too large" in line for line in lines), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_an_imported_model_trains_on_own_text_with_its_own_tokenizer_alone(
    imported: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(300)))
    json_file(tmp_path / "other", special=[*SPECIAL, "<x>"])
    short = ("updates=6", "batch=8", "evaluate_every_updates=6", "eval_tokens=500")
    phase = ("cycle_updates=2", "warm_up_updates=1", "restart_warm_up_updates=1", "peak_lr=0.01")
    words = [f"--config={imported / 'config.py'}", f"--text={text}", "--config.data.sequence_length=16"]
    words += [f"--config.train.{word}" for word in short] + [f"--config.relora.{word}" for word in phase]
    words += ["--config.data.validation_fraction=0.2"]
    # of both commands: how it is compiled moves a loss by its last digit
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

    def train(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "relora_jax.train", *words, f"--workdir={tmp_path / 'run'}", *more]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    other = train(f"--config.data.tokenizer={tmp_path / 'other'}", "--config.data.eos_id=-1")
    assert other.returncode == 2 and "was trained with another tokenizer" in other.stderr, other.stderr
    ended = train()
    assert ended.returncode == 0, ended.stderr
    assert f"begins at update 0 with {imported}" in ended.stdout
    rows = record.read(tmp_path / "run").points("eval", "perplexity")
    assert [u for u, _ in rows] == [0, 6] and rows[1][1] < rows[0][1]

    (tmp_path / "elsewhere").mkdir()
    large = tmp_path / "large.jsonl"
    large.write_text(text.read_text() * 40)
    moved = text.rename(tmp_path / "elsewhere" / text.name)
    for place, where, expected in ((tmp_path / "run", moved, rows[1][1]), (imported, large, None)):
        command = [sys.executable, "-m", "relora_jax.evaluate", f"--workdir={place}", "--json"]
        lost = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert lost.returncode == 2 and "Traceback" not in lost.stderr, lost.stderr
        found = subprocess.run([*command, f"--text={where}"], capture_output=True, text=True, env=environment)
        assert found.returncode == 0, found.stderr
        assert expected is None or json.loads(found.stdout)["perplexity"] == pytest.approx(expected, rel=1e-6)
