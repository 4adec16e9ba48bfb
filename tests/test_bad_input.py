"""A mistake ends in one line with the value and the remedy, exit code 2, and changes nothing on disk."""

import gzip
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import pytest

from relora_jax import cli, errors, prepare, train
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.config import to_json
from relora_jax.tokenizer import tokenizer
from tests.support.commands import TOY
from tests.support.documents import texts, write_dataset
from tests.support.tokenizers import json_file

CUDNN = "--config.model.attention=cudnn --config.model.compute_dtype=bfloat16 --config.model.head_dim=8"
# {flags after --config=toy.py: what the error line must contain}
SETTINGS = {
    "--config.relora.rank=0": "relora.rank 0 does not fit a 16 x 16 kernel: choose 1 to 16",
    "--config.relora.rank=-3": "relora.rank -3 does not fit",
    "--config.relora.rank=9": "relora.rank 9 does not fit a 16 x 8 kernel: choose 1 to 8 (the kernel k)",
    "--config.relora.rank=two": "relora.rank=two",
    "--config.relora.rank=1.5": "relora.rank=1.5",
    "--config.relora.rnk=3": "relora.rnk",
    "--config.reloro.rank=3": "reloro",
    "--config.relora.jagged=maybe": "jagged=maybe",
    "--config.relora.cycle_updates=0": "relora.cycle_updates 0 must be at least 1",
    "--config.relora.cycle_updates=-4": "relora.cycle_updates -4",
    "--config.relora.cycle_updates=12": "no restart in the low-rank phase of 12 updates",
    "--config.relora.merges_per_cycle=3": "merges_per_cycle 3 must divide the cycle of 4",
    "--config.relora.merges_per_cycle=0": "merges_per_cycle 0",
    "--config.relora.warm_up_updates=12": "relora.warm_up_updates 12",
    "--config.relora.warm_up_updates=5": "relora.warm_up_updates 5",
    "--config.relora.warm_up_updates=-1": "relora.warm_up_updates -1",
    "--config.relora.restart_warm_up_updates=5": "relora.restart_warm_up_updates 5",
    "--config.optimizer.warm_up_updates=5": "longer than the warm start of 4",
    "--config.optimizer.warm_up_updates=16": "optimizer.warm_up_updates 16",
    "--config.relora.warm_start_updates=16": "relora.warm_start_updates 16",
    "--config.train.updates=13": "ends inside a re-warm-up",
    "--config.train.updates=14": "ends inside a re-warm-up",
    "--config.train.updates=99999999999": "train.updates 99999999999",
    "--config.train.updates=0": "train.updates 0",
    "--config.train.batch=0": "train.batch 0",
    "--config.train.batch=-8": "train.batch -8",
    "--config.train.batch=6": "train.microbatch 8 must divide train.batch 6",
    "--config.train.microbatch=0": "train.microbatch 0",
    "--config.train.microbatch=2 --config.mesh.fsdp=2": "multiple of the 8 devices",
    "--config.mesh.fsdp=3": "must equal the 8 devices",
    "--config.mesh.fsdp=0": "mesh.fsdp 0",
    "--config.mesh.tensor=8": "mesh.tensor 8 splits whole heads",
    "--config.mesh.data=4": "must equal the 8 devices",
    "--config.data.sequence_length=0": "data.sequence_length 0",
    "--config.data.packing=sorted": "data.packing 'sorted'",
    "--config.relora.base_dtype=float64": "relora.base_dtype",
    "--config.model.rope_scaling=fast": "model.rope_scaling: rope scaling 'fast' is not valid: use none",
    "--config.model.rope_scaling=linear(0)": "its numbers must be finite and above 0",
    "--config.model.max_positions=11": "data.sequence_length 12 exceeds model.max_positions 11",
    "--config.model.max_positions=-1": "model.max_positions -1",
    "--config.model.family=gemma": "'gemma' is unknown: choose one of llama, mistral, qwen2, qwen3",
    "--config.model.family=qwen3 --config.model.sliding_window=11": (
        "data.sequence_length 12 exceeds model.sliding_window 11: shorten it"
    ),
    "--config.model.sliding_window=64": "model.sliding_window 64: the family llama has none",
    "--config.data.bos_id=380": "data.bos_id 380 is not an id of tokenizer",
    "--config.relora.peak_lr=0": "relora.peak_lr 0",
    "--config.relora.peak_lr=-1e-3": "relora.peak_lr -0.001",
    "--config.optimizer.peak_lr=nan": "optimizer.peak_lr nan",
    "--config.optimizer.peak_lr=inf": "optimizer.peak_lr inf",
    "--config.optimizer.min_lr_ratio=1.5": "optimizer.min_lr_ratio 1.5",
    "--config.optimizer.b2=1": "optimizer.b2 1",
    "--config.optimizer.weight_decay=-0.1": "optimizer.weight_decay -0.1",
    "--config.optimizer.clip_norm=-1": "optimizer.clip_norm -1",
    "--config.optimizer.kernel_lr_ratio=0": "optimizer.kernel_lr_ratio 0",
    "--config.relora.factor_lr_ratio=0": "relora.factor_lr_ratio 0",
    "--config.relora.dropout=1": "relora.dropout 1",
    "--config.relora.dropout=-0.1": "relora.dropout -0.1",
    "--config.relora.dropout=nan": "relora.dropout nan",
    "--config.relora.dropout=0.1 --config.relora.product=fused": "fused",
    "--config.relora.product=sum": "relora.product 'sum'",
    "--config.relora.prune=magnitude(1.5)": "magnitude(1.5)",
    "--config.relora.prune=half": "'half'",
    "--config.relora.prune=magnitude(0.9) --config.relora.reset_count=true": "reset_count needs",
    "--config.relora.base_init=zero": "warm start",
    "--config.relora.base_init=ones": "relora.base_init 'ones'",
    "--config.relora.base_dtype=float16": "relora.base_dtype 'float16'",
    "--config.relora.targets=embed": "relora.targets 'embed'",
    "--config.relora.alpha=0": "relora.alpha 0",
    "--config.model.kv_heads=3": "model.kv_heads 3 must divide",
    "--config.model.head_dim=5": "model.head_dim 5 must be even",
    "--config.model.attention=splash": "model.attention splash needs a TPU, not cpu: use xla",
    "--config.model.attention=cudnn": "cudnn computes in bfloat16, not in model.compute_dtype float32: set",
    f"{CUDNN} --config.model.head_dim=12": "multiple of 8 up to 256, not 12: set model.attention to xla",
    f"{CUDNN} --config.data.sequence_length=11": "needs an even data.sequence_length, not 11: change it",
    f"{CUDNN} --config.data.sequence_length=64 --config.data.attend_across_documents=false": "may give NaN",
    CUDNN: "needs a GPU",
    "--config.model.attention=flash": "model.attention 'flash'",
    "--config.model.remat=all": "model.remat 'all'",
    "--config.model.compute_dtype=half": "model.compute_dtype 'half'",
    "--config.model.layers=0": "model.layers 0",
    "--config.train.eval_tokens=0": "train.eval_tokens 0",
    "--config.train.seed=-1": "train.seed -1",
    "--confg.train.seed=1": "confg",
    "stray": "'stray'",
    "--config.data.dataset=nothing": "dataset nothing is not in",
    "--config.data.dataset=nothing:1.0.0": "set TFDS_DATA_DIR to the directory that holds nothing/<version>",
    "--config.data.dataset=empty": "no bpe model of 380 pieces can be trained on this text: there is no text",
    "--config.data.dataset=empty --config.data.tokenizer=toy.model": "train part has too little text",
    "--config.data.dataset=images": "images:1.0.0 has no feature `text` of plain text",
    "--config.data.dataset=latin": "document 1 of latin:1.0.0 train is not UTF-8",
    "--config.data.dataset=": "set data.text to files of your own, or data.dataset",
    "--config.data.validation_split=test": "toy:1.0.0 has no split 'test': choose train, validation",
    "--config.data.train_tokens=-1": "data.train_tokens -1",
    "--text=nothing/*.txt": "data.text 'nothing/*.txt' matches no file",
    "--text=": "--text has no value: write --text=VALUE, or omit it",
    "--text": "--text has no value",
    "--text --workdir=w": "--text has no value",
    "--text=toy.py": "toy.py of data.text 'toy.py' has an unsupported file type",
    "--text latin.jsonl": "latin.jsonl, line 2 is not UTF-8",
    "--text=broken.jsonl": "broken.jsonl, line 2 is not JSON",
    "--text=cut.jsonl.gz": "cut.jsonl.gz is damaged after line",
    "--text=good.jsonl --text_field=content": "line 1 has no field 'content': set data.text_field to one of",
    "--text=good.jsonl --config.data.validation_fraction=1": "data.validation_fraction 1.0 must lie in",
    "--text=good.jsonl --config.data.validation_fraction=1e-9": "raise data.validation_fraction",
    "--text=good.jsonl --config.data.sequence_length=60000": "too little text for one row of data.seq",
    "--config.data.train_split=trian": "trian",
    "--config.data.tokenizer=bpe(99999999999)": "'bpe(99999999999)' is invalid: write a number of pieces",
    "--config.data.tokenizer=t5": "'t5' not found, and there is no",
    "--config.data.tokenizer=thesis.model": "thesis.model is not a SentencePiece model: use another file",
    "--config.data.tokenizer=thesis.json": "thesis.json is not a valid tokenizer.json (",
    "--config.data.tokenizer=folder": "'folder' is a directory without tokenizer.json",
    "--config.data.tokenizer=endless.json": "has no eos to end documents with: set data.eos_id",
    "--config.data.tokenizer=endless.json --config.data.eos_id=4000": "eos_id 4000 is not an id of tokenizer",
    "--config.data.eos_id=380": "data.eos_id 380 is not an id of tokenizer",
    "--config.data.pad_id=-2": "data.pad_id -2 is not an id of tokenizer",
    "--config.model.vocab_size=379": "380 pieces and model.vocab_size is 379",
    "--config.train.batch=4096": "fewer than one train.batch",
}
COMMAND_LINES = {
    "": "--config=",
    "--config=nowhere.py": "nowhere.py",
    "--config=toy.py:reloro": "unknown arm 'reloro'",
    "--config=toy.py:lora --config.relora.warm_start_updates=4": "use lora_warm",
    "--config=toy.py:full --config.relora.rank=0": "relora.rank 0",
    "--config=toy.py:full --config.relora.warm_start_updates=-1": "relora.warm_start_updates -1",
    "--config=wrong.py": "get_config",
    "--config=broken.py": "SyntaxError",
    "--config=bare.py:full": "the config file offers no choice: leave out the colon",
    "--config=toy.py --workdir=s3://bucket/run": "use a local path, or gs://bucket/run",
    "--config=toy.py --config.train.init_from=s3://b/run": "use a local path, or gs://bucket/run",
    "--config=odd.py": "model.layers = 2.5 must be of type int",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with configs, text files and toy datasets, valid and not."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "toy.py").write_text(TOY)
    (folder / "wrong.py").write_text("def get_config(arm=''):\n    return 3\n")
    (folder / "bare.py").write_text("def get_config():\n    return 3\n")
    (folder / "broken.py").write_text("def get_config(:\n")
    (folder / "odd.py").write_text(TOY.replace("vocab_size = 380", "layers = 2.5"))
    for name in ("thesis.model", "thesis.json"):
        (folder / name).write_text("On the rank of updates")
    json_file(folder, special=["<unk>"], name="endless.json")
    (folder / "folder").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
        write_dataset("empty:1.0.0", {"train": ["", ""], "validation": texts(20)})
        write_dataset("images:1.0.0", {"train": ["t"], "validation": ["v"]}, feature="label")
        write_dataset("latin:1.0.0", {"train": ["fine", b"caf\xe9 "], "validation": texts(20)})
    tokenizer.train(tokenizer._lines(texts(60)), kind="bpe", vocab_size=380, path=folder / "toy.model")
    good = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts(60))
    (folder / "good.jsonl").write_bytes(good)
    (folder / "latin.jsonl").write_bytes(good[: good.index(b"\n") + 1] + b'{"text": "caf\xe9"}\n')
    (folder / "broken.jsonl").write_bytes(good[: good.index(b"\n") + 9])
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(good)[:-200])
    return folder


@pytest.fixture(autouse=True)
def workspace(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))


def error_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The only line of stderr of the train command, which must exit with 2."""
    with pytest.raises(SystemExit) as stop:
        cli.main(train.main, train.__doc__, ["train", *args])
    captured = capsys.readouterr()
    assert stop.value.code == 2
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.parametrize("line", SETTINGS)
def test_wrong_setting_is_named_in_one_line(line: str, capsys: Any) -> None:
    assert SETTINGS[line] in error_line(["--config=toy.py", *line.split()], capsys)
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_wrong_command_line_is_named_in_one_line(line: str, capsys: Any) -> None:
    assert COMMAND_LINES[line] in error_line(line.split(), capsys)
    assert not pathlib.Path("runs").exists()


def test_workdir_that_is_a_file_or_read_only_is_named(capsys: Any) -> None:
    pathlib.Path("file").write_text("mine")
    pathlib.Path("dangling").symlink_to("nowhere")
    for workdir in ("file", "file/run", "/proc/run", "/dev/null", "dangling"):
        assert workdir in error_line(["--config=toy.py", f"--workdir={workdir}"], capsys)
    assert pathlib.Path("file").read_text() == "mine"


def test_prepare_also_checks_types(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(prepare.main, prepare.__doc__, ["prepare", "--config=odd.py"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: model.layers = 2.5 must be of type int\n"


def test_missing_text_exits_with_74_once_a_run_has_begun(capsys: Any, tmp_path: pathlib.Path) -> None:
    args = ["train", "--config=toy.py", "--text=missing/*.jsonl", f"--workdir={tmp_path}"]
    (tmp_path / "config.json").write_text(to_json(cli.parse(args, workdir="")[0]))
    for begun in (False, True):
        if begun:
            (tmp_path / "checkpoints" / "4").mkdir(parents=True)
        with pytest.raises(SystemExit) as stop:
            cli.main(train.main, train.__doc__, args)
        assert stop.value.code == (errors.NO_DATA if begun else errors.BAD_SETTING)
        [line] = capsys.readouterr().err.splitlines()
        assert "data.text 'missing/*.jsonl' matches no file" in line and ("fix the disk" in line) == begun


def test_warm_start_from_a_run_with_another_tokenizer_is_refused(capsys: Any, tmp_path: pathlib.Path) -> None:
    source = cli.parse(["train", "--config=toy.py:full"])[0]
    with Checkpoints(tmp_path, source) as checkpoints:
        checkpoints._write(4, {"opt_state/x": jnp.zeros(2), "trained/x": jnp.zeros(2)})
    (tmp_path / "run.json").write_text('{"rows": {"train": {"tokenizer": "mine"}}}')
    line = error_line(["--config=toy.py", f"--config.train.init_from={tmp_path}"], capsys)
    assert "was trained with another tokenizer (tokenizer: mine -> " in line
    assert not pathlib.Path("runs").exists()


def test_workdir_that_holds_something_else_is_left_alone(capsys: Any, tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert "is not empty and not a run" in error_line(["--config=toy.py", f"--workdir={tmp_path}"], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
