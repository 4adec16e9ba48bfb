"""The command samples from a checkpoint's model; of the run's data it needs only the tokenizer."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax import cli, generate
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.data.prepared import prepare, tokenizer_of
from relora_jax.run import directory
from relora_jax.storage.writer import Writer
from relora_jax.tokenizer.tokenizer import Tokenizer
from relora_jax.training.program import Program
from relora_jax.training.state import flatten, model_of
from tests.support import small
from tests.support.documents import texts, write_dataset

CONFIG = small.config(
    model__vocab_size=400, data__dataset="toy", data__tokenizer="bpe(380)", train__keep_last=9
)
LENGTH = small.LENGTH
PROMPT = "The union of"


@dataclasses.dataclass
class Args:
    """Command-line values."""

    n: int = 2
    seed: int = 0
    max_tokens: int = 12
    temperature: float = 1.0
    top_p: float = 0.9


@dataclasses.dataclass
class SavedRun:
    """A run whose dataset and rows were deleted, and its states by update."""

    workdir: pathlib.Path
    tokenizer: Tokenizer
    program: Program
    states: dict[int, Any]

    def logits(self, u: int, ids: np.ndarray) -> np.ndarray:
        """The model's logits for the id after each position."""
        state = self.states[u]
        phase = self.program.low_phase if jax.tree.leaves(state.frozen) else self.program.phase
        call = jax.jit(lambda trained, frozen, ids: phase.model(trained, frozen)(ids))
        return np.array(call(state.trained, state.frozen, jnp.asarray(ids)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(generate, "enable_compilation_cache", lambda: None)  # it sets process-wide options
        patch.setattr(generate, "AT_ONCE", 2)
        write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
        prepared = prepare(CONFIG.data)
        shutil.rmtree(folder / "tfds")
        shutil.rmtree(folder / "cache" / "relora_jax" / "rows")
        program = Program(CONFIG, small.mesh())
        patch.setattr(generate, "Program", lambda *_: program)  # compiled once for all these tests
        full = program.init()
        far = {"seed": 0, "deviation": 0.3}
        low = program.start_low_rank(jax.tree.map(jnp.copy, full))
        states = {4: small.moved(full, **far), 6: small.moved(low, **far)}
        run = SavedRun(folder / "run", prepared.tokenizer, program, states)
        run.workdir.mkdir()
        directory.begin(Writer(run.workdir), CONFIG, unigram_perplexity=1.0, rows=directory.keys_of(prepared))
        with Checkpoints(run.workdir, CONFIG) as checkpoints:
            for u, state in states.items():
                checkpoints._write(u, flatten(model_of(state)))
                checkpoints.wait()
        yield run


@pytest.fixture
def workdir(run: SavedRun, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(run.workdir, tmp_path / "run"))


def output(capsys: Any, *args: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(generate.main, generate.__doc__, ["generate", *args])
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    return out, err


def samples(capsys: Any, workdir: pathlib.Path, *args: str) -> list[dict[str, Any]]:
    out, _ = output(capsys, f"--workdir={workdir}", "--json", *args)
    return [json.loads(line) for line in out.splitlines()]


def error_line(capsys: Any, workdir: Any, *args: str) -> str:
    _, err = output(capsys, f"--workdir={workdir}", *args, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# full-rank; in mid-cycle, with live factors
@pytest.mark.parametrize("u", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_greedy_text_is_the_argmax_of_the_model_on_the_growing_prefix(
    run: SavedRun, capsys: Any, u: int
) -> None:
    args = ("--n=2", "--temperature=0", "--max_tokens=2", *([f"--update={u}"] if u != 6 else []))
    before = {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*")}
    first, second = samples(capsys, run.workdir, f"--prompt={PROMPT}", *args)
    assert {path: path.stat().st_mtime_ns for path in run.workdir.rglob("*")} == before
    ids = run.tokenizer.encode_documents([PROMPT])[0]
    start = len(ids)
    while len(ids) < start + 2 and ids[-1] != run.tokenizer.eos:
        logits = run.logits(u, ids[None])[0, -1]
        logits[[run.tokenizer.pad, *range(run.tokenizer.vocab_size, 400)]] = -np.inf
        ids = np.append(ids, logits.argmax().astype(np.int32))
    assert first["text"] == run.tokenizer.decode(ids).removeprefix(PROMPT) != ""
    assert second == {**first, "sample": 1}
    about = {"workdir": str(run.workdir), "arm": "relora", "update": u, "seed": 0, "sample": 0}
    end = {"tokens": len(ids) - start, "document_ended": bool(ids[-1] == run.tokenizer.eos)}
    assert first == {**about, "prompt": PROMPT, "text": first["text"], **end}


def test_same_seed_gives_the_same_samples_for_any_n(run: SavedRun, capsys: Any) -> None:
    def draw(*args: str) -> list[str]:
        rows = samples(capsys, run.workdir, f"--prompt={PROMPT}", *args)
        assert [each["sample"] for each in rows] == list(range(len(rows)))
        return [each["text"] for each in rows]

    five = draw("--n=5")  # in groups of two
    assert len(set(five)) == 5 and five == draw("--n=5")
    assert draw("--n=2") == five[:2] and draw("--n=1") == five[:1]
    assert set(draw("--n=5", "--seed=1")).isdisjoint(five)
    assert run.program._sample[True]._cache_size() == 2  # for groups of one and of two


@pytest.mark.slow
def test_sharded_model_draws_the_same_samples(run: SavedRun) -> None:
    [request] = generate.requests([5, 6, 7], Args(), run.tokenizer, [run.tokenizer.eos], length=LENGTH)
    for u, state in run.states.items():
        shared = Program(CONFIG, small.mesh(2, 2))
        sharded = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, shared.state_at(u)))
        assert len(sharded.trained["norm"]["scale"].sharding.device_set) == 4
        many = shared.sample(sharded, request)
        assert all(array.sharding.is_fully_replicated for array in many)
        for one, other in zip(run.program.sample(state, request), many, strict=True):
            assert (np.asarray(one) == np.asarray(other)).all()


def test_output_is_prompt_and_continuation_with_a_note_if_max_tokens_is_reduced(
    run: SavedRun, capsys: Any
) -> None:
    args = (f"--workdir={run.workdir}", f"--prompt={PROMPT}", "--seed=3")
    tokens = len(run.tokenizer.encode_documents([PROMPT])[0])
    one, two = samples(capsys, run.workdir, *args[1:], "--n=2")
    ended = f"note: sample 1, 2 ended at the model's length, {LENGTH}\n"
    assert output(capsys, *args, "--n=2")[1] == ended
    out, err = output(capsys, *args, "--n=2", "--max_tokens=128")
    head = "--- {} of 2, update 6 of " + f"{run.workdir}\n[{PROMPT}]"
    shown = [generate._printable(each["text"]) for each in (one, two)]
    assert out == f"{head.format(1)}{shown[0]}\n{head.format(2)}{shown[1]}\n"
    room = LENGTH + 1 - tokens
    assert err == (
        f"note: --max_tokens=128 is reduced to {room}: the prompt has {tokens} tokens "
        f"and the model's length is {LENGTH}\n{ended}"
    )
    assert max(one["tokens"], two["tokens"]) <= room
    assert output(capsys, *args, "--n=2", f"--max_tokens={room}") == (out, "")


def test_sample_ends_at_any_eos_of_an_imported_model(run: SavedRun, capsys: Any, monkeypatch: Any) -> None:
    args = (f"--prompt={PROMPT}", "--temperature=0", "--n=1")
    prompt = run.tokenizer.encode_documents([PROMPT])[0].tolist()
    [request] = generate.requests(prompt, Args(n=1, temperature=0.0), run.tokenizer, [399], length=LENGTH)
    [ids], [end] = map(np.asarray, run.program.sample(run.states[6], request))
    third = int(ids[len(prompt) + 2])
    before = ids[: 1 + [*ids[:end], third].index(third, len(prompt))]
    facts = json.loads((run.workdir / "run.json").read_text())
    special = {"special": {"eos_token_id": [third, 399]}}
    monkeypatch.setattr(generate.record, "read_facts", lambda workdir: facts | special)
    [sample] = samples(capsys, run.workdir, *args)
    assert sample["document_ended"] and sample["tokens"] == len(before) - len(prompt) <= 3
    assert PROMPT + sample["text"] == run.tokenizer.decode(before[:-1])
    assert output(capsys, f"--workdir={run.workdir}", *args)[1] == ""


def test_eos_of_the_run_ends_a_sample_beside_those_of_the_model(run: SavedRun, monkeypatch: Any) -> None:
    monkeypatch.setattr(generate.record, "read_facts", lambda _: {"special": {"eos_token_id": [7, 5]}})
    assert generate.ends_of(run.workdir, run.tokenizer) == [run.tokenizer.eos, 7, 5]


def test_sample_whose_last_possible_token_is_eos_was_not_cut(
    run: SavedRun, capsys: Any, monkeypatch: Any
) -> None:
    args = (f"--prompt={PROMPT}", "--temperature=0", "--n=1")
    prompt = run.tokenizer.encode_documents([PROMPT])[0].tolist()
    [request] = generate.requests(prompt, Args(n=1, temperature=0.0), run.tokenizer, [399], length=LENGTH)
    [ids], [end] = map(np.asarray, run.program.sample(run.states[6], request))
    assert end == LENGTH + 1
    last = int(ids[LENGTH])
    whole = np.array(ids)
    whole[len(prompt) : LENGTH][whole[len(prompt) : LENGTH] == last] = 7
    monkeypatch.setattr(generate, "ends_of", lambda *_: [last])
    monkeypatch.setattr(type(run.program), "sample", lambda *_: ([whole], [end]))
    [sample] = samples(capsys, run.workdir, *args)
    assert sample["document_ended"] and sample["tokens"] == LENGTH + 1 - len(prompt)
    assert output(capsys, f"--workdir={run.workdir}", *args)[1] == ""


def test_no_control_characters_are_printed() -> None:
    assert generate._printable("a\x1b[2J\n\tb\rc\x07") == "a\ufffd[2J\n\tb\ufffdc\ufffd"


def test_empty_prompt_is_the_end_of_the_previous_document(run: SavedRun, capsys: Any) -> None:
    [first, _] = samples(capsys, run.workdir, "--n=2", "--temperature=0", "--max_tokens=1")
    logits = run.logits(6, np.array([[run.tokenizer.eos]], np.int32))[0, -1]
    logits[[run.tokenizer.pad, *range(run.tokenizer.vocab_size, 400)]] = -np.inf
    assert first["text"] == run.tokenizer.decode([int(logits.argmax())])


def test_prompt_of_separate_documents_begins_after_its_last_end(run: SavedRun) -> None:
    ids = run.tokenizer.encode_documents([PROMPT])[0].tolist()
    cut = dataclasses.replace(run.tokenizer, eos=ids[1])
    for change in ({"packing": "truncate"}, {"attend_across_documents": False}):
        apart = dataclasses.replace(CONFIG.data, **change)
        assert generate.prompt_ids(PROMPT, run.tokenizer, apart) == ids
        assert generate.prompt_ids(PROMPT, cut, apart) == ids[2:]
        for prompt, tokenizer in (("", cut), (PROMPT, dataclasses.replace(cut, eos=ids[-1]))):
            with pytest.raises(ValueError, match="has not learned how one begins"):
                generate.prompt_ids(prompt, tokenizer, apart)
    assert generate.prompt_ids(PROMPT, cut, CONFIG.data) == ids
    assert generate.prompt_ids("", cut, CONFIG.data) == [cut.eos]
    with_bos = dataclasses.replace(run.tokenizer, bos=9)
    for data in (CONFIG.data, apart):
        assert generate.prompt_ids("", with_bos, data) == [9]
        assert generate.prompt_ids(PROMPT, with_bos, data) == [9, *ids]


BAD = {
    "--n=0": "--n=0 must be at least 1",
    "--n=two": "'two'",
    "--temperature=-0.1": "--temperature=-0.1 must lie in [0, 1e+06]; 0 is greedy decoding",
    "--temperature=nan": "--temperature=nan must lie in",
    "--temperature=inf": "--temperature=inf must lie in",
    "--temperature=1e300": "--temperature=1e+300 must lie in",
    "--top_p=0": "--top_p=0.0 must lie in (0, 1]",
    "--top_p=1.01": "--top_p=1.01 must lie in (0, 1]",
    "--top_p=nan": "--top_p=nan must lie",
    "--max_tokens=0": "--max_tokens=0 must be at least 1",
    "--seed=1.5": "'1.5'",
    "--seed=-1": "--seed=-1 must lie in [0, 2147483648)",
    "--seed=2147483648": "--seed=2147483648",
    "--update=7": "no checkpoint at --update=7: choose one of 4, 6",
    "--update=last": "'last'",
    "--prompt=" + "union " * 40: "tokens and the model's length is 12: shorten it",
    "--prompt=\udcff": "is not UTF-8",
    "--promt=a": "--promt=a",
    "stray": "unrecognized arguments: stray",
    "--workdir=nowhere": "'nowhere' holds no run",
}


@pytest.mark.parametrize("word", BAD)
def test_mistake_is_named_in_one_line(run: SavedRun, word: str, capsys: Any) -> None:
    assert BAD[word] in error_line(capsys, run.workdir, word)


def test_prompt_as_long_as_the_model_leaves_one_token(run: SavedRun, capsys: Any) -> None:
    word = run.tokenizer.encode_documents([" union"])[0]
    assert len(word) == 1
    [sample, _] = samples(capsys, run.workdir, "--n=2", "--prompt=" + " union" * LENGTH)
    assert sample["tokens"] == 1
    assert f"has {LENGTH + 1} tokens" in error_line(
        capsys, run.workdir, "--prompt=" + " union" * (LENGTH + 1)
    )


def test_run_that_cannot_be_sampled_from_is_explained(workdir: pathlib.Path, capsys: Any) -> None:
    facts = json.loads((workdir / "run.json").read_text())
    facts["rows"]["train"]["tokenizer"] = "another"
    (workdir / "run.json").write_text(json.dumps(facts))
    assert "was trained with a tokenizer other than" in error_line(capsys, workdir)
    del facts["rows"]["train"]["tokenizer"]
    (workdir / "run.json").write_text(json.dumps(facts))
    assert "does not say which tokenizer the run has" in error_line(capsys, workdir)
    shutil.rmtree(workdir / "checkpoints")
    assert "no checkpoint yet" in error_line(capsys, workdir)


def test_trained_tokenizer_is_only_retrained_on_the_same_text(
    run: SavedRun, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    rows = json.loads((run.workdir / "run.json").read_text())["rows"]["train"]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no longer in the cache.*is missing \(.*toy.*--tokenizer=PATH"):
        tokenizer_of(CONFIG.data, rows)
    write_dataset("toy:1.0.0", {"train": texts(60), "validation": ["a"]})
    write_dataset("toy:1.0.1", {"train": texts(50), "validation": ["a"]})  # a newer version is ignored
    assert tokenizer_of(CONFIG.data, rows).sha256 == run.tokenizer.sha256 == rows["tokenizer"]
    files = dataclasses.replace(CONFIG.data, text=str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("changed")
    key = {**rows, "text": "another", "text_field": "text", "validation_fraction": 0.01}
    del key["dataset"], key["split"]
    with pytest.raises(ValueError, match="the text that it was trained on has changed"):
        tokenizer_of(files, key)
