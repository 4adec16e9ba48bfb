"""Perplexity is exp of the token-weighted mean, whatever the batches; padding weighs nothing.

The command says of a checkpoint what the run said of itself there, of any split, and harms nothing.
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
from relora_jax.data.stores import How
from relora_jax.model.loss import token_loss
from relora_jax.run import directory, restored
from relora_jax.storage.writer import Writer
from relora_jax.training import evaluation
from relora_jax.training.evaluation import Evaluation, evaluate
from relora_jax.training.program import Program
from relora_jax.training.state import flatten, model_of
from tests.support import small
from tests.support.commands import Place, ended
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
    found = evaluate(program, state, parts)
    logits = program.phase.model(state.trained, state.frozen)(jnp.asarray(ids[:, :-1]))
    nats, count = token_loss(logits, jnp.asarray(ids), jnp.asarray(lengths))
    assert found.tokens == int(count) == (lengths - 1).sum()
    assert math.isclose(found.loss, float(nats) / int(count), rel_tol=1e-6)
    assert math.isclose(found.perplexity, math.exp(found.loss), rel_tol=1e-9)


def test_padding_rows_of_a_short_batch_weigh_nothing(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    whole = evaluate(program, state, [Batch(jnp.asarray(ids[:3]), jnp.asarray(lengths[:3]))])
    padded = lengths[:4] * np.array([1, 1, 1, 0], np.int32)
    same = evaluate(program, state, [Batch(jnp.asarray(ids[:4]), jnp.asarray(padded))])
    assert whole.tokens == same.tokens and math.isclose(whole.loss, same.loss, rel_tol=1e-6)


def test_evaluation_of_documents_apart_is_that_of_each_alone(program: Program) -> None:
    state, (ids, lengths) = program.init(), rows()
    ids[:, 2] = 0
    alone = np.zeros((16, ids.shape[1]), np.int32)
    alone[:8, :3], alone[8:, :-3] = ids[:, :3], ids[:, 3:]
    cut = np.concatenate([np.minimum(lengths, 3), np.maximum(lengths - 3, 0)])
    expected = evaluate(program, state, [Batch(jnp.asarray(alone), jnp.asarray(cut))])
    numbers = (np.arange(ids.shape[1]) > 2).astype(np.int32) + np.zeros_like(ids)
    found = evaluate(program, state, [Batch(*map(jnp.asarray, (ids, lengths, numbers)))])
    assert found.tokens == expected.tokens < (lengths - 1).sum()
    assert math.isclose(found.loss, expected.loss, rel_tol=1e-6)


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


def test_few_batches_wait_on_the_devices(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, lengths = rows()
    batch, done, ahead = Batch(jnp.asarray(ids), jnp.asarray(lengths)), [], []
    sums = iter([(float(i), 1) for i in range(20)])
    monkeypatch.setattr(program, "eval_step", lambda *_: next(sums))
    monkeypatch.setattr(jax, "block_until_ready", lambda each: done.append(int(each[0])))

    def batches() -> Any:
        for i in range(20):
            ahead.append(i - max(done, default=0))
            yield batch

    assert evaluate(program, program.init(), batches()).loss == sum(range(20)) / 20
    assert max(ahead) <= evaluation._AHEAD


MADE = small.config(
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
class Made:
    """A run with checkpoints at UPDATES, what it said of itself there, and the last one's state."""

    place: pathlib.Path
    prepared: Prepared
    program: Program
    state: Any
    at: dict[int, Evaluation]

    def evaluated(self, store: data.RowStore, tokens: int = 100) -> Evaluation:
        rows = {"microbatch": MADE.train.microbatch, "sharding": self.program.eval_rows}
        batches = data.validation_batches(store, eval_tokens=tokens, across_documents=True, **rows)
        return evaluate(self.program, self.state, list(batches))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("evaluate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(command, "keep_compiled", lambda: None)  # it is a setting of the whole process
        splits = {
            "train": texts(60),
            "validation": texts(20, seed=1),
            "test": texts(9, seed=2),
            "tiny": ["a"],
        }
        write_dataset("toy:1.0.0", splits)
        prepared = prepare(MADE.data)
        program = Program(MADE, small.mesh(4, 2))
        compiled = {(to_json(MADE), program.mesh): program}  # once for all the commands of these tests
        patch.setattr(
            command, "Program", lambda c, mesh: compiled.get((to_json(c), mesh)) or Program(c, mesh)
        )
        run = Made(folder / "run", prepared, program, program.init(), {})
        with directory.locked(Writer(run.place), MADE), Checkpoints(run.place, MADE) as checkpoints:
            directory.begin(Writer(run.place), MADE, unigram_perplexity=1.0, rows=directory.keys_of(prepared))
            for u in UPDATES:
                if u == 6:
                    run.state = program.start_low_rank(run.state)
                run.state = small.moved(run.state, seed=u)
                run.at[u] = run.evaluated(prepared.validation)
                whole = u == UPDATES[-1]  # the others hold a model and no moments, as an imported one
                checkpoints._write(u, flatten(run.state if whole else model_of(run.state)))
                checkpoints.wait()
        yield run


@pytest.fixture
def place(made: Made, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(made.place, tmp_path / "run"))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def told(capsys: Any, place: pathlib.Path, *words: str) -> dict[str, Any]:
    return json.loads(ended(capsys, f"--workdir={place}", "--json", *words))


@pytest.mark.parametrize("u", UPDATES)
def test_command_says_what_the_run_said_with_or_without_moments_and_writes_nothing(
    made: Made, place: pathlib.Path, u: int, capsys: Any
) -> None:
    with directory.locked(Writer(place), MADE):  # the run goes on
        before = contents(place)
        found = told(capsys, place, *([f"--update={u}"] if u != UPDATES[-1] else []))
        assert contents(place) == before
    said = {key: found[key] for key in ("loss", "perplexity", "tokens")}
    assert said == made.at[u]._asdict()
    about = {"workdir": str(place), "arm": "relora", "update": u, "split": "validation", "rows": 8}
    assert found == said | about | {"rows_of_split": made.prepared.validation.rows}
    assert len({one.loss for one in made.at.values()}) == len(UPDATES)


def test_line_says_how_much_was_counted(made: Made, capsys: Any) -> None:
    store, workdir = made.prepared.validation, f"--workdir={made.place}"
    whole = made.evaluated(store, tokens=10**6)
    assert whole.tokens == store.rows * small.LENGTH
    assert ended(capsys, workdir, "--tokens=1M") == (
        f"update 8 of {made.place}: validation loss {whole.loss:.4f} nats, perplexity "
        f"{whole.perplexity:,.1f} over {whole.tokens:,} tokens, the whole split"
    )
    part = ended(capsys, workdir, "--tokens=0.2k")
    assert part.endswith(f" over 192 tokens, 16 of the split's {store.rows} rows")


def test_any_split_of_the_dataset_is_read_with_the_tokenizer_of_the_run(made: Made, capsys: Any) -> None:
    for split in ("test", "validation[50%:]"):
        store = rows_of_split(MADE.data, split, made.prepared.tokenizer, How())
        assert store.manifest["key"]["split"] == split
        found, expected = told(capsys, made.place, f"--split={split}"), made.evaluated(store)
        assert (found["loss"], found["rows_of_split"]) == (expected.loss, store.rows)
    train = told(capsys, made.place, "--split=train", "--tokens=1B")
    assert train["loss"] == made.evaluated(made.prepared.train, 10**9).loss
    assert train["rows"] == train["rows_of_split"] == made.prepared.train.rows


@pytest.mark.parametrize("newer", [False, True])
def test_run_is_evaluated_on_the_version_that_it_was_trained_on(
    made: Made, tmp_path: pathlib.Path, newer: bool, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))  # its own version is gone
    if newer:
        write_dataset("toy:1.1.0", {"train": texts(9), "validation": texts(9)})
    assert told(capsys, made.place)["loss"] == made.at[8].loss


def test_text_that_was_moved_is_that_of_the_run_with_its_files_of_held_out_text(
    made: Made, place: pathlib.Path, tmp_path: pathlib.Path, capsys: Any
) -> None:
    for name, documents in (("train", texts(60)), ("validation", texts(20, seed=1))):
        (tmp_path / "old").mkdir(exist_ok=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / "old" / f"{name}.jsonl").write_text(lines)
    files = lambda folder: {  # noqa: E731
        "text": str(tmp_path / folder / "train.jsonl"),
        "validation_text": str(tmp_path / folder / "validation.jsonl"),
    }
    own = dataclasses.replace(
        MADE, data=dataclasses.replace(MADE.data, dataset="", validation_fraction=0.3, **files("old"))
    )
    own.data.tokenizer = str(made.prepared.tokenizer.path)
    (place / "config.json").write_text(to_json(own))
    directory.begin(Writer(place), own, unigram_perplexity=1.0, rows=directory.keys_of(prepare(own.data)))
    shutil.rmtree(place / "checkpoints")
    with Checkpoints(place, own) as checkpoints:
        checkpoints._write(8, flatten(made.state))
    (tmp_path / "old").rename(tmp_path / "new")
    words = [f"--{name}={pattern}" for name, pattern in files("new").items()]
    assert told(capsys, place, *words)["loss"] == made.at[8].loss
    assert "trained on other rows" in ended(capsys, f"--workdir={place}", words[0], code=2)


def test_devices_and_microbatch_change_rounding_alone(made: Made, place: pathlib.Path, capsys: Any) -> None:
    assert dict(restored.mesh_of(MADE).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    other = small.config(mesh__fsdp=3)
    assert dict(restored.mesh_of(other).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    moved = dataclasses.replace(MADE, mesh=other.mesh, train=dataclasses.replace(MADE.train, microbatch=2))
    moved.model = dataclasses.replace(MADE.model, attention="cudnn")  # of the GPU that it was trained on
    (place / "config.json").write_text(to_json(moved))
    for words in ([], ["--microbatch=16"]):
        found = told(capsys, place, *words)
        assert found["tokens"] == made.at[8].tokens
        assert math.isclose(found["loss"], made.at[8].loss, rel_tol=1e-6)


def test_tokenizer_that_was_moved_is_named_and_another_refused(
    made: Made, tmp_path: pathlib.Path, capsys: Any
) -> None:
    content = made.prepared.tokenizer.path.read_bytes()
    (tmp_path / "moved.model").write_bytes(content)
    found = told(capsys, made.place, f"--tokenizer={tmp_path / 'moved.model'}")
    assert found["loss"] == made.at[8].loss
    (tmp_path / "other.model").write_bytes(content + b"\x1a\x00")  # the same pieces
    line = ended(capsys, f"--workdir={made.place}", f"--tokenizer={tmp_path / 'other.model'}", code=2)
    assert "was trained with another tokenizer than" in line and "--tokenizer=PATH" in line


def test_loss_that_is_not_finite_is_strict_json(made: Made, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(command, "evaluate", lambda *_: Evaluation(math.nan, math.nan, 96))
    found = told(capsys, made.place)
    assert found["loss"] is None and found["perplexity"] is None and found["tokens"] == 96


BAD = {
    "--update=7": "no checkpoint of --update=7: there are 4, 6, 8",
    "--update=last": "'last'",
    "--tokens=0": "'0' is no number of tokens: write 32768, 500k, 10M or 1B",
    "--tokens=-5": "'-5' is no number of tokens",
    "--tokens=99999999999999999999999B": "is no number of tokens",
    "--text=": "--text: it names nothing",
    "--validation_text=": "--validation_text: it names nothing",
    "--validation_text=*.txt": "--validation_text=*.txt goes with --text: give both",
    "--tokens=ten": "'ten' is no number of tokens",
    "--tokens=1.5": "'1.5' is no number of tokens",
    "--tokens=10m": "'10m' is no number of tokens",
    "--tokens=": "'' is no number of tokens",
    "--microbatch=0": "--microbatch=0 must be a multiple of the number of devices here, 8",
    "--microbatch=12": "--microbatch=12",
    "--split=tset": "no split 'tset': there are train, validation, test",
    "--split=test[:0%]": "test[:0%]",
    "--split=tiny": "too little text for one row",
    "--updat=4": "--updat=4",
    "8": "unrecognized arguments: 8",
    "--workdir=nowhere": "'nowhere' holds no run",
}


@pytest.mark.parametrize("word", BAD)
def test_mistake_is_named_in_one_line(made: Made, word: str, capsys: Any) -> None:
    before = contents(made.place)
    assert BAD[word] in ended(capsys, f"--workdir={made.place}", word, code=2)
    assert contents(made.place) == before


def test_tokens_are_plain_numbers_or_k_m_b() -> None:
    counts = {"7": 7, "10k": 10_000, "1.5M": 1_500_000, "10M": 10_000_000, "2B": 2 * 10**9}
    assert {text: command._count(text) for text in counts} == counts


def changed_config(place: pathlib.Path, change: Any) -> None:
    config = json.loads((place / "config.json").read_text())
    change(config)
    (place / "config.json").write_text(json.dumps(config))


def test_run_that_cannot_be_evaluated_is_told_why(place: pathlib.Path, capsys: Any) -> None:
    def refused(*words: str) -> str:
        return ended(capsys, f"--workdir={place}", *words, code=2)

    original, facts = (place / "config.json").read_text(), (place / "run.json").read_text()
    changed_config(place, lambda config: config["train"].update(seed=1))
    assert "is of another run (train.seed: 0 -> 1)" in refused()
    changed_config(place, lambda config: config["data"].update(text="*.txt"))
    assert "--split=test: data.text" in refused("--split=test")
    changed_config(place, lambda config: config["relora"].update(base_dtype="int3"))
    assert "config.json: relora.base_dtype 'int3'" in refused()
    (place / "config.json").write_text("{")
    assert "config.json" in refused()
    (place / "config.json").write_text(original)
    changed_rows = json.loads(facts)
    changed_rows["rows"]["validation"]["tokenizer"] = "another"
    (place / "run.json").write_text(json.dumps(changed_rows))
    for split in ("validation", "test"):
        assert "validation tokenizer: another" in refused(f"--split={split}")
    shutil.rmtree(place / "checkpoints")
    assert "no checkpoint yet" in refused()


def damage(place: pathlib.Path, u: int) -> None:
    shutil.rmtree(place / "checkpoints" / str(u) / "state")


def test_damaged_checkpoint_names_an_older_whole_one_and_stays(place: pathlib.Path, capsys: Any) -> None:
    damage(place, 6)
    assert ended(capsys, f"--workdir={place}", "--update=6", code=2).endswith(
        "--update=4 is whole, take that one"
    )
    damage(place, 8)
    before = contents(place)
    line = ended(capsys, f"--workdir={place}", code=2)
    assert "checkpoints/8 cannot be read" in line and line.endswith("--update=4 is whole, take that one")
    assert contents(place) == before
    damage(place, 4)
    assert "no other is whole" in ended(capsys, f"--workdir={place}", code=2)


def test_newer_checkpoint_is_named_where_none_before_is_whole(place: pathlib.Path, capsys: Any) -> None:
    damage(place, 4)
    line = ended(capsys, f"--workdir={place}", "--update=4", code=2)
    assert line.endswith("--update=6 is whole, take that one")


def test_checkpoint_deleted_meanwhile_is_not_called_damaged(
    place: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deleted(*_: Any) -> Any:
        shutil.rmtree(place / "checkpoints" / "6")
        raise DamagedError("cut")

    monkeypatch.setattr(restored, "restore", deleted)
    line = ended(capsys, f"--workdir={place}", "--update=6", code=2)
    assert line == f"error: {place} deleted its checkpoint of 6 meanwhile: take a newer one"


def test_lost_disk_ends_in_a_line_and_74(made: Made, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(data.RowStore, "read", lost)
    assert "Input/output error" in ended(capsys, f"--workdir={made.place}", code=errors.NO_DATA)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["full", "relora"])
def test_command_equals_the_rows_of_the_run_bitwise(arm: str, tmp_path: pathlib.Path) -> None:
    place = Place(tmp_path)
    cadence = [f"--config.train.{name}=1" for name in ("save_every_updates", "evaluate_every_updates")]
    config = f"--config={place.folder / 'toy.py'}:{arm}"
    trained = place.train(config, *cadence, "--config.train.keep_last=20", workdir="run")
    assert trained.returncode == 0, trained.stderr
    rows = {row["update"]: row for row in place.rows("run") if row["kind"] == "eval"}
    for u in (4, 7, 8, 20):
        found = place.evaluate("--json", *([f"--update={u}"] if u < 20 else []), workdir="run")
        assert found.returncode == 0, found.stderr
        said = json.loads(found.stdout)
        assert {key: said[key] for key in rows[u] if key != "kind"} == {
            key: value for key, value in rows[u].items() if key != "kind"
        }
