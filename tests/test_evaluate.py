"""Perplexity is exp of the token-weighted mean loss, independent of batching and padding.

The command reproduces the run's own evaluation of a checkpoint, reads any split, and changes nothing.
"""

import dataclasses
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax import errors
from relora_jax import evaluate as command
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.saved import DamagedError
from relora_jax.config import to_json
from relora_jax.data import batches as data
from relora_jax.data.batches import Batch
from relora_jax.data.prepared import Prepared, prepare, rows_of_split
from relora_jax.data.stores import PrepareOptions
from relora_jax.run import directory, restored
from relora_jax.storage.writer import Writer
from relora_jax.training import evaluation
from relora_jax.training.evaluation import Evaluation, evaluate
from relora_jax.training.program import Program
from relora_jax.training.state import flatten, model_of
from tests.support import small
from tests.support.commands import Sandbox, output_line
from tests.support.documents import texts, write_dataset


@pytest.fixture(scope="module")
def program() -> Program:
    return Program(small.config(), small.mesh())


def rows() -> tuple[np.ndarray, np.ndarray]:
    ids, _ = small.rows(small.config(), 0)
    return ids.reshape(8, -1), np.array([13, 2, 7, 13, 5, 3, 13, 2], np.int32)


def test_evaluation_weighs_tokens_not_batches(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    parts = [Batch(jnp.asarray(ids[i : i + 4]), jnp.asarray(lengths[i : i + 4])) for i in (0, 4)]
    result = evaluate(program, state, parts)
    model = program.phase.model(state.trained, state.frozen)
    nats, count = model.loss(jnp.asarray(ids), jnp.asarray(lengths))
    assert result.tokens == int(count) == (lengths - 1).sum()
    assert math.isclose(result.loss, float(nats) / int(count), rel_tol=1e-6)
    assert math.isclose(result.perplexity, math.exp(result.loss), rel_tol=1e-9)


def test_padding_rows_of_a_short_batch_have_no_weight(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    whole = evaluate(program, state, [Batch(jnp.asarray(ids[:3]), jnp.asarray(lengths[:3]))])
    padded = lengths[:4] * np.array([1, 1, 1, 0], np.int32)
    same = evaluate(program, state, [Batch(jnp.asarray(ids[:4]), jnp.asarray(padded))])
    assert whole.tokens == same.tokens and math.isclose(whole.loss, same.loss, rel_tol=1e-6)


def test_evaluation_without_a_target_has_no_loss(program: Program) -> None:
    ids, _ = rows()
    none = evaluate(program, program.init(), [Batch(jnp.asarray(ids[:4]), jnp.ones(4, jnp.int32))])
    assert math.isnan(none.loss) and math.isnan(none.perplexity) and none.tokens == 0


def test_evaluation_of_separate_documents_equals_that_of_each_alone(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    ids[:, 2] = 0
    alone = np.zeros((16, ids.shape[1]), np.int32)
    alone[:8, :3], alone[8:, :-3] = ids[:, :3], ids[:, 3:]
    cut = np.concatenate([np.minimum(lengths, 3), np.maximum(lengths - 3, 0)])
    expected = evaluate(program, state, [Batch(jnp.asarray(alone), jnp.asarray(cut))])
    numbers = (np.arange(ids.shape[1]) > 2).astype(np.int32) + np.zeros_like(ids)
    result = evaluate(program, state, [Batch(*map(jnp.asarray, (ids, lengths, numbers)))])
    assert result.tokens == expected.tokens < (lengths - 1).sum()
    assert math.isclose(result.loss, expected.loss, rel_tol=1e-6)


def test_evaluation_in_both_phases_leaves_the_state_alone(program: Program) -> None:
    ids, lengths = rows()
    batches = [Batch(jnp.asarray(ids), jnp.asarray(lengths))]
    full = program.init()
    before = evaluate(program, full, batches)
    low = program.start_low_rank(full)
    copies = [np.asarray(leaf) for leaf in jax.tree.leaves(low)]
    after = evaluate(program, low, batches)
    assert math.isclose(before.loss, after.loss, rel_tol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(copies, jax.tree.leaves(low), strict=True))


def test_few_batches_are_queued_on_the_devices(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lengths = rows()
    batch, finished, ahead = Batch(jnp.asarray(ids), jnp.asarray(lengths)), [], []
    sums = iter([(float(i), 1) for i in range(20)])
    monkeypatch.setattr(program, "eval_step", lambda *_: next(sums))
    monkeypatch.setattr(jax, "block_until_ready", lambda each: finished.append(int(each[0])))

    def batches() -> Any:
        for i in range(20):
            ahead.append(i - max(finished, default=0))
            yield batch

    assert evaluate(program, program.init(), batches()).loss == sum(range(20)) / 20
    assert max(ahead) <= evaluation._MAX_QUEUED


CONFIG = small.config(
    model__vocab_size=380,
    data__dataset="toy",
    data__tokenizer="bpe(380)",
    data__validation_split="validation[:50%]",
    train__microbatch=8,
    train__keep_last=20,
    mesh__fsdp=2,
)
UPDATES = (4, 6, 8)  # full-rank; in mid-cycle, with live factors; before the restart that u = 8 begins with


@dataclasses.dataclass
class SavedRun:
    """A run with checkpoints at UPDATES, its evaluations there, and its last state."""

    workdir: pathlib.Path
    prepared: Prepared
    program: Program
    state: Any
    at: dict[int, Evaluation]

    def evaluated(self, store: data.RowStore, tokens: int = 100) -> Evaluation:
        rows = {"microbatch": CONFIG.train.microbatch, "sharding": self.program.eval_rows}
        batches = data.validation_batches(store, eval_tokens=tokens, across_documents=True, **rows)
        return evaluate(self.program, self.state, list(batches))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(command, "enable_compilation_cache", lambda: None)  # it sets process-wide options
        splits = {
            "train": texts(60),
            "validation": texts(20, seed=1),
            "test": texts(9, seed=2),
            "tiny": ["a"],
        }
        write_dataset("toy:1.0.0", splits)
        prepared = prepare(CONFIG.data)
        program = Program(CONFIG, small.mesh(4, 2))
        compiled = {(to_json(CONFIG), program.mesh): program}  # shared by the commands of these tests
        patch.setattr(
            command, "Program", lambda c, mesh: compiled.get((to_json(c), mesh)) or Program(c, mesh)
        )
        run = SavedRun(folder / "run", prepared, program, program.init(), {})
        with directory.locked(Writer(run.workdir), CONFIG), Checkpoints(run.workdir, CONFIG) as checkpoints:
            directory.begin(
                Writer(run.workdir), CONFIG, unigram_perplexity=1.0, rows=directory.keys_of(prepared)
            )
            for u in UPDATES:
                if u == 6:
                    run.state = program.start_low_rank(run.state)
                run.state = small.moved(run.state, seed=u)
                run.at[u] = run.evaluated(prepared.validation)
                whole = u == UPDATES[-1]  # the others have a model without moments, like an import
                checkpoints._write(u, flatten(run.state if whole else model_of(run.state)))
                checkpoints.wait()
        yield run


@pytest.fixture
def workdir(run: SavedRun, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run.workdir, tmp_path / "run"))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def json_result(capsys: Any, workdir: pathlib.Path, *args: str) -> dict[str, Any]:
    return json.loads(output_line(capsys, f"--workdir={workdir}", "--json", *args))


@pytest.mark.parametrize("u", UPDATES)
def test_command_equals_the_evaluation_of_the_run_with_or_without_moments_and_writes_nothing(
    run: SavedRun, workdir: pathlib.Path, u: int, capsys: Any
) -> None:
    with directory.locked(Writer(workdir), CONFIG):  # the run is still training
        before = contents(workdir)
        result = json_result(capsys, workdir, *([f"--update={u}"] if u != UPDATES[-1] else []))
        assert contents(workdir) == before
    metrics = {key: result[key] for key in ("loss", "perplexity", "tokens")}
    assert metrics == run.at[u]._asdict()
    about = {"workdir": str(workdir), "arm": "relora", "update": u, "split": "validation", "rows": 8}
    assert result == metrics | about | {"rows_of_split": run.prepared.validation.rows}
    assert len({evaluation.loss for evaluation in run.at.values()}) == len(UPDATES)


def test_line_states_how_much_was_evaluated(run: SavedRun, capsys: Any) -> None:
    store, flag = run.prepared.validation, f"--workdir={run.workdir}"
    whole = run.evaluated(store, tokens=10**6)
    assert whole.tokens == store.rows * small.LENGTH
    assert output_line(capsys, flag, "--tokens=1M") == (
        f"update 8 of {run.workdir}: validation loss {whole.loss:.4f} nats, perplexity "
        f"{whole.perplexity:,.1f} over {whole.tokens:,} tokens, the whole split"
    )
    part = output_line(capsys, flag, "--tokens=0.2k")
    assert part.endswith(f" over 192 tokens, 16 of the split's {store.rows} rows")


def test_any_split_of_the_dataset_is_evaluated_with_the_tokenizer_of_the_run(
    run: SavedRun, capsys: Any
) -> None:
    for split in ("test", "validation[50%:]"):
        store = rows_of_split(CONFIG.data, split, run.prepared.tokenizer, PrepareOptions())
        assert store.manifest["key"]["split"] == split
        result, expected = json_result(capsys, run.workdir, f"--split={split}"), run.evaluated(store)
        assert (result["loss"], result["rows_of_split"]) == (expected.loss, store.rows)
    train = json_result(capsys, run.workdir, "--split=train", "--tokens=1B")
    assert train["loss"] == run.evaluated(run.prepared.train, 10**9).loss
    assert train["rows"] == train["rows_of_split"] == run.prepared.train.rows


@pytest.mark.parametrize("newer", [False, True])
def test_run_is_evaluated_on_the_version_that_it_was_trained_on(
    run: SavedRun, tmp_path: pathlib.Path, newer: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))  # the version it was trained on is missing
    if newer:
        write_dataset("toy:1.1.0", {"train": texts(9), "validation": texts(9)})
    assert json_result(capsys, run.workdir)["loss"] == run.at[8].loss


def test_moved_text_is_accepted_together_with_its_held_out_files(
    run: SavedRun, workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    for name, documents in (("train", texts(60)), ("validation", [*texts(20, seed=1), None])):
        (tmp_path / "old").mkdir(exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / "old" / f"{name}.jsonl").write_text(lines)
    files = lambda folder: {  # noqa: E731
        "text": str(tmp_path / folder / "train.jsonl"),
        "validation_text": str(tmp_path / folder / "validation.jsonl"),
    }
    own = dataclasses.replace(
        CONFIG, data=dataclasses.replace(CONFIG.data, dataset="", validation_fraction=0.3, **files("old"))
    )
    own.data.tokenizer = str(run.prepared.tokenizer.path)
    (workdir / "config.json").write_text(to_json(own))
    prepared = prepare(own.data, PrepareOptions(skip_bad_documents=True))
    directory.begin(Writer(workdir), own, unigram_perplexity=1.0, rows=directory.keys_of(prepared))
    shutil.rmtree(workdir / "checkpoints")
    with Checkpoints(workdir, own) as checkpoints:
        checkpoints._write(8, flatten(run.state))
    (tmp_path / "old").rename(tmp_path / "new")
    args = [f"--{name}={pattern}" for name, pattern in files("new").items()]
    assert json_result(capsys, workdir, *args)["loss"] == run.at[8].loss
    for store in (prepared.train, prepared.validation):  # they are built again without the null
        shutil.rmtree(store.path.parent)
    assert json_result(capsys, workdir, *args)["loss"] == run.at[8].loss
    assert "trained on other rows" in output_line(capsys, f"--workdir={workdir}", args[0], code=2)


@pytest.mark.slow
def test_devices_and_microbatch_change_only_the_rounding(
    run: SavedRun, workdir: pathlib.Path, capsys: Any
) -> None:
    assert dict(restored.mesh_of(CONFIG).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    other = small.config(mesh__fsdp=3)
    assert dict(restored.mesh_of(other).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    moved = dataclasses.replace(
        CONFIG, mesh=other.mesh, train=dataclasses.replace(CONFIG.train, microbatch=2)
    )
    moved.model = dataclasses.replace(CONFIG.model, attention="cudnn")  # of the GPU that it was trained on
    (workdir / "config.json").write_text(to_json(moved))
    for args in ([], ["--microbatch=16"]):
        result = json_result(capsys, workdir, *args)
        assert result["tokens"] == run.at[8].tokens
        assert math.isclose(result["loss"], run.at[8].loss, rel_tol=1e-6)


def test_moved_tokenizer_is_accepted_and_another_is_refused(
    run: SavedRun, tmp_path: pathlib.Path, capsys: Any
) -> None:
    content = run.prepared.tokenizer.path.read_bytes()
    (tmp_path / "moved.model").write_bytes(content)
    result = json_result(capsys, run.workdir, f"--tokenizer={tmp_path / 'moved.model'}")
    assert result["loss"] == run.at[8].loss
    (tmp_path / "other.model").write_bytes(content + b"\x1a\x00")  # the same pieces
    line = output_line(capsys, f"--workdir={run.workdir}", f"--tokenizer={tmp_path / 'other.model'}", code=2)
    assert "was trained with a tokenizer other than" in line and "--tokenizer=PATH" in line


def test_non_finite_loss_is_valid_json(run: SavedRun, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "evaluate", lambda *_: Evaluation(math.nan, math.nan, 96))
    result = json_result(capsys, run.workdir)
    assert result["loss"] is None and result["perplexity"] is None and result["tokens"] == 96


def test_devices_that_share_a_row_need_no_rows_of_their_own() -> None:
    config = small.config(mesh__tensor=2, train__microbatch=6)
    mesh = restored.mesh_of(config)
    assert command._microbatch(config, 12, mesh) == 12 and command._microbatch(config, None, mesh) == 8


BAD = {
    "--update=7": "no checkpoint at --update=7: choose one of 4, 6, 8",
    "--update=last": "'last'",
    "--tokens=0": "'0' is not a number of tokens: write 32768, 500k, 10M or 1B",
    "--tokens=-5": "'-5' is not a number of tokens",
    "--tokens=99999999999999999999999B": "is not a number of tokens",
    "--text=": "--text: the value is empty",
    "--validation_text=": "--validation_text: the value is empty",
    "--validation_text=*.txt": "--validation_text=*.txt needs --text: pass both",
    "--tokens=ten": "'ten' is not a number of tokens",
    "--tokens=1.5": "'1.5' is not a number of tokens",
    "--tokens=10m": "'10m' is not a number of tokens",
    "--tokens=": "'' is not a number of tokens",
    "--microbatch=0": "--microbatch=0 must be a multiple of the 8 devices that share it",
    "--microbatch=12": "--microbatch=12",
    "--split=tset": "no split 'tset': choose train, validation, test",
    "--split=test[:0%]": "test[:0%]",
    "--split=tiny": "too little text for one row",
    "--updat=4": "--updat=4",
    "8": "unrecognized arguments: 8",
    "--workdir=nowhere": "'nowhere' holds no run",
}


@pytest.mark.parametrize("flag", BAD)
def test_mistake_is_named_in_one_line(run: SavedRun, flag: str, capsys: Any) -> None:
    before = contents(run.workdir)
    assert BAD[flag] in output_line(capsys, f"--workdir={run.workdir}", flag, code=2)
    assert contents(run.workdir) == before


def test_tokens_are_plain_numbers_or_k_m_b() -> None:
    counts = {"7": 7, "10k": 10_000, "1.5M": 1_500_000, "10M": 10_000_000, "2B": 2 * 10**9}
    assert {text: command._count(text) for text in counts} == counts


def change_config(workdir: pathlib.Path, change: Any) -> None:
    config = json.loads((workdir / "config.json").read_text())
    change(config)
    (workdir / "config.json").write_text(json.dumps(config))


def test_run_that_cannot_be_evaluated_is_explained(workdir: pathlib.Path, capsys: Any) -> None:
    def refused(*args: str) -> str:
        return output_line(capsys, f"--workdir={workdir}", *args, code=2)

    original, facts = (workdir / "config.json").read_text(), (workdir / "run.json").read_text()
    change_config(workdir, lambda config: config["train"].update(seed=1))
    assert "belongs to another run (train.seed: 0 -> 1)" in refused()
    change_config(workdir, lambda config: config["data"].update(text="*.txt"))
    assert "--split=test: data.text" in refused("--split=test")
    change_config(workdir, lambda config: config["relora"].update(base_dtype="int3"))
    assert "config.json: relora.base_dtype 'int3'" in refused()
    (workdir / "config.json").write_text("{")
    assert "config.json" in refused()
    (workdir / "config.json").write_text(original)
    changed_rows = json.loads(facts)
    changed_rows["rows"]["validation"]["tokenizer"] = "another"
    (workdir / "run.json").write_text(json.dumps(changed_rows))
    for split in ("validation", "test"):
        assert "validation tokenizer: another" in refused(f"--split={split}")
    shutil.rmtree(workdir / "checkpoints")
    assert "no checkpoint yet" in refused()


def damage(workdir: pathlib.Path, u: int) -> None:
    shutil.rmtree(workdir / "checkpoints" / str(u) / "state")


def test_damaged_checkpoint_is_kept_and_an_older_intact_one_is_named(
    workdir: pathlib.Path, capsys: Any
) -> None:
    damage(workdir, 6)
    assert output_line(capsys, f"--workdir={workdir}", "--update=6", code=2).endswith(
        "use --update=4, which is intact"
    )
    damage(workdir, 8)
    before = contents(workdir)
    line = output_line(capsys, f"--workdir={workdir}", code=2)
    assert "checkpoints/8 cannot be read" in line and line.endswith("use --update=4, which is intact")
    assert contents(workdir) == before
    damage(workdir, 4)
    assert "no other checkpoint is intact" in output_line(capsys, f"--workdir={workdir}", code=2)


def test_newer_checkpoint_is_named_if_no_older_one_is_intact(workdir: pathlib.Path, capsys: Any) -> None:
    damage(workdir, 4)
    line = output_line(capsys, f"--workdir={workdir}", "--update=4", code=2)
    assert line.endswith("use --update=6, which is intact")


def test_checkpoint_deleted_during_the_command_is_not_called_damaged(
    workdir: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleted(*_: Any) -> Any:
        shutil.rmtree(workdir / "checkpoints" / "6")
        raise DamagedError("cut")

    monkeypatch.setattr(restored, "restore", deleted)
    line = output_line(capsys, f"--workdir={workdir}", "--update=6", code=2)
    assert line == f"error: {workdir} has deleted its checkpoint at update 6: use a newer one"


def test_disk_failure_exits_with_74_and_one_line(
    run: SavedRun, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(data.RowStore, "read", failing)
    assert "Input/output error" in output_line(capsys, f"--workdir={run.workdir}", code=errors.NO_DATA)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["full", "relora"])
def test_command_equals_the_rows_of_the_run_bitwise(arm: str, tmp_path: pathlib.Path) -> None:
    sandbox = Sandbox(tmp_path)
    cadence = [f"--config.train.{name}=1" for name in ("save_every_updates", "evaluate_every_updates")]
    config = f"--config={sandbox.folder / 'toy.py'}:{arm}"
    trained = sandbox.train(config, *cadence, "--config.train.keep_last=20", workdir="run")
    assert trained.returncode == 0, trained.stderr
    rows = {row["update"]: row for row in sandbox.rows("run") if row["kind"] == "eval"}
    for u in (4, 7, 8, 20):
        process = sandbox.evaluate("--json", *([f"--update={u}"] if u < 20 else []), workdir="run")
        assert process.returncode == 0, process.stderr
        result = json.loads(process.stdout)
        assert {key: result[key] for key in rows[u] if key != "kind"} == {
            key: value for key, value in rows[u].items() if key != "kind"
        }
