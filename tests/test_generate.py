"""The command writes on as the model of a checkpoint would; of the text it needs the tokenizer alone."""

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

MADE = small.config(
    model__vocab_size=400, data__dataset="toy", data__tokenizer="bpe(380)", train__keep_last=9
)
LENGTH = small.LENGTH
PROMPT = "The union of"


@dataclasses.dataclass
class Words:
    """Of a command line."""

    n: int = 2
    seed: int = 0
    max_tokens: int = 12
    temperature: float = 1.0
    top_p: float = 0.9


@dataclasses.dataclass
class Made:
    """A run whose dataset and rows are gone, and its states by update."""

    place: pathlib.Path
    tokenizer: Tokenizer
    program: Program
    states: dict[int, Any]

    def logits(self, u: int, ids: np.ndarray) -> np.ndarray:
        """The model's, of each id's successor."""
        state = self.states[u]
        phase = self.program.low_phase if jax.tree.leaves(state.frozen) else self.program.phase
        call = jax.jit(lambda trained, frozen, ids: phase.model(trained, frozen)(ids))
        return np.array(call(state.trained, state.frozen, jnp.asarray(ids)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("generate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setattr(generate, "keep_compiled", lambda: None)  # it is a setting of the whole process
        patch.setattr(generate, "AT_ONCE", 2)
        write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})
        prepared = prepare(MADE.data)
        shutil.rmtree(folder / "tfds")
        shutil.rmtree(folder / "cache" / "relora_jax" / "rows")
        program = Program(MADE, small.mesh())
        patch.setattr(generate, "Program", lambda *_: program)  # compiled once for all these tests
        full = program.init()
        far = {"seed": 0, "deviation": 0.3}
        low = program.start_low_rank(jax.tree.map(jnp.copy, full))
        states = {4: small.moved(full, **far), 6: small.moved(low, **far)}
        run = Made(folder / "run", prepared.tokenizer, program, states)
        run.place.mkdir()
        directory.begin(Writer(run.place), MADE, unigram_perplexity=1.0, rows=directory.keys_of(prepared))
        with Checkpoints(run.place, MADE) as checkpoints:
            for u, state in states.items():
                checkpoints._write(u, flatten(model_of(state)))
                checkpoints.wait()
        yield run


@pytest.fixture
def place(made: Made, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(made.place, tmp_path / "run"))


def ended(capsys: Any, *words: str, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of the command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(generate.main, generate.__doc__, ["generate", *words])
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    return out, err


def samples(capsys: Any, place: pathlib.Path, *words: str) -> list[dict[str, Any]]:
    out, _ = ended(capsys, f"--workdir={place}", "--json", *words)
    return [json.loads(line) for line in out.splitlines()]


def refused(capsys: Any, place: Any, *words: str) -> str:
    _, err = ended(capsys, f"--workdir={place}", *words, code=2)
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# full-rank; in mid-cycle, with live factors
@pytest.mark.parametrize("u", [pytest.param(4, marks=pytest.mark.slow), 6])
def test_greedy_text_is_the_argmax_of_the_full_model_on_the_growing_prefix(
    made: Made, capsys: Any, u: int
) -> None:
    words = ("--n=2", "--temperature=0", "--max_tokens=2", *([f"--update={u}"] if u != 6 else []))
    before = {path: path.stat().st_mtime_ns for path in made.place.rglob("*")}
    first, second = samples(capsys, made.place, f"--prompt={PROMPT}", *words)
    assert {path: path.stat().st_mtime_ns for path in made.place.rglob("*")} == before
    ids = made.tokenizer.encode_documents([PROMPT])[0]
    start = len(ids)
    while len(ids) < start + 2 and ids[-1] != made.tokenizer.eos:
        logits = made.logits(u, ids[None])[0, -1]
        logits[[made.tokenizer.pad, *range(made.tokenizer.vocab_size, 400)]] = -np.inf
        ids = np.append(ids, logits.argmax().astype(np.int32))
    assert first["text"] == made.tokenizer.decode(ids).removeprefix(PROMPT) != ""
    assert second == {**first, "sample": 1}
    about = {"workdir": str(made.place), "arm": "relora", "update": u, "seed": 0, "sample": 0}
    end = {"tokens": len(ids) - start, "document_ended": bool(ids[-1] == made.tokenizer.eos)}
    assert first == {**about, "prompt": PROMPT, "text": first["text"], **end}


def test_same_seed_gives_the_same_samples_however_many_there_are(made: Made, capsys: Any) -> None:
    def drawn(*words: str) -> list[str]:
        found = samples(capsys, made.place, f"--prompt={PROMPT}", *words)
        assert [each["sample"] for each in found] == list(range(len(found)))
        return [each["text"] for each in found]

    five = drawn("--n=5")  # in groups of two
    assert len(set(five)) == 5 and five == drawn("--n=5")
    assert drawn("--n=2") == five[:2] and drawn("--n=1") == five[:1]
    assert set(drawn("--n=5", "--seed=1")).isdisjoint(five)
    assert made.program._sample[True]._cache_size() == 2  # for one and for two; of each length and choice


@pytest.mark.slow
def test_devices_that_share_the_model_draw_the_same(made: Made) -> None:
    [asked] = generate.requests([5, 6, 7], Words(), made.tokenizer, length=LENGTH)
    for u, state in made.states.items():
        shared = Program(MADE, small.mesh(2, 2))
        there = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, shared.state_at(u)))
        assert len(there.trained["norm"]["scale"].sharding.device_set) == 4
        many = shared.sample(there, asked)
        assert all(array.sharding.is_fully_replicated for array in many)
        for one, other in zip(made.program.sample(state, asked), many, strict=True):
            assert (np.asarray(one) == np.asarray(other)).all()


def test_people_read_prompt_and_continuation_and_hear_where_the_row_ends(made: Made, capsys: Any) -> None:
    words = (f"--workdir={made.place}", f"--prompt={PROMPT}", "--seed=3")
    tokens = len(made.tokenizer.encode_documents([PROMPT])[0])
    one, two = samples(capsys, made.place, *words[1:], "--n=2")
    assert ended(capsys, *words, "--n=2")[1] == ""
    out, err = ended(capsys, *words, "--n=2", "--max_tokens=128")
    head = "--- {} of 2, update 6 of " + f"{made.place}\n[{PROMPT}]"
    shown = [generate._printable(each["text"]) for each in (one, two)]
    assert out == f"{head.format(1)}{shown[0]}\n{head.format(2)}{shown[1]}\n"
    room = LENGTH + 1 - tokens
    assert err == (
        f"note: after the prompt's {tokens} tokens the model's length of {LENGTH} leaves {room} "
        "of --max_tokens=128: samples end there\n"
    )
    assert max(one["tokens"], two["tokens"]) <= room
    assert ended(capsys, *words, "--n=2", f"--max_tokens={room}") == (out, "")


def test_a_terminal_is_shown_no_control_characters() -> None:
    assert generate._printable("a\x1b[2J\n\tb\rc\x07") == "a\ufffd[2J\n\tb\ufffdc\ufffd"


def test_empty_prompt_is_the_end_of_the_document_before(made: Made, capsys: Any) -> None:
    [first, _] = samples(capsys, made.place, "--n=2", "--temperature=0", "--max_tokens=1")
    logits = made.logits(6, np.array([[made.tokenizer.eos]], np.int32))[0, -1]
    logits[[made.tokenizer.pad, *range(made.tokenizer.vocab_size, 400)]] = -np.inf
    assert first["text"] == made.tokenizer.decode([int(logits.argmax())])


def test_prompt_of_documents_apart_begins_after_its_last_end(made: Made) -> None:
    ids = made.tokenizer.encode_documents([PROMPT])[0].tolist()
    cut = dataclasses.replace(made.tokenizer, eos=ids[1])
    for change in ({"packing": "truncate"}, {"attend_across_documents": False}):
        apart = dataclasses.replace(MADE.data, **change)
        assert generate.prompt_ids(PROMPT, made.tokenizer, apart) == ids
        assert generate.prompt_ids(PROMPT, cut, apart) == ids[2:]
        for prompt, tokenizer in (("", cut), (PROMPT, dataclasses.replace(cut, eos=ids[-1]))):
            with pytest.raises(ValueError, match="never learnt what one begins with"):
                generate.prompt_ids(prompt, tokenizer, apart)
    assert generate.prompt_ids(PROMPT, cut, MADE.data) == ids
    assert generate.prompt_ids("", cut, MADE.data) == [cut.eos]
    begun = dataclasses.replace(made.tokenizer, bos=9)
    for data in (MADE.data, apart):
        assert generate.prompt_ids("", begun, data) == [9] and generate.prompt_ids(PROMPT, begun, data) == [
            9,
            *ids,
        ]


BAD = {
    "--n=0": "--n=0 must be at least 1",
    "--n=two": "'two'",
    "--temperature=-0.1": "--temperature=-0.1 must lie in [0, 1e+06]",
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
    "--update=7": "no checkpoint of --update=7: there are 4, 6",
    "--update=last": "'last'",
    "--prompt=" + "union " * 40: "tokens and the model's length is 12: shorten it",
    "--prompt=\udcff": "is not UTF-8",
    "--promt=a": "--promt=a",
    "words": "unrecognized arguments: words",
    "--workdir=nowhere": "'nowhere' holds no run",
}


@pytest.mark.parametrize("word", BAD)
def test_mistake_is_named_in_one_line(made: Made, word: str, capsys: Any) -> None:
    assert BAD[word] in refused(capsys, made.place, word)


def test_prompt_as_long_as_the_model_leaves_one_piece(made: Made, capsys: Any) -> None:
    word = made.tokenizer.encode_documents([" union"])[0]
    assert len(word) == 1
    [sample, _] = samples(capsys, made.place, "--n=2", "--prompt=" + " union" * LENGTH)
    assert sample["tokens"] == 1
    assert f"has {LENGTH + 1} tokens" in refused(capsys, made.place, "--prompt=" + " union" * (LENGTH + 1))


def test_run_that_cannot_be_sampled_from_is_told_why(place: pathlib.Path, capsys: Any) -> None:
    facts = json.loads((place / "run.json").read_text())
    facts["rows"]["train"]["tokenizer"] = "another"
    (place / "run.json").write_text(json.dumps(facts))
    assert "was trained with another tokenizer than" in refused(capsys, place)
    del facts["rows"]["train"]["tokenizer"]
    (place / "run.json").write_text(json.dumps(facts))
    assert "does not say which tokenizer the run has" in refused(capsys, place)
    shutil.rmtree(place / "checkpoints")
    assert "no checkpoint yet" in refused(capsys, place)


def test_trained_tokenizer_is_made_again_of_the_same_text_alone(
    made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    rows = json.loads((made.place / "run.json").read_text())["rows"]["train"]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"no longer in the cache.*is not there \(.*toy.*--tokenizer=PATH"):
        tokenizer_of(MADE.data, rows)
    write_dataset("toy:1.0.0", {"train": texts(60), "validation": ["a"]})
    write_dataset("toy:1.0.1", {"train": texts(50), "validation": ["a"]})  # a newer one is not looked at
    assert tokenizer_of(MADE.data, rows).sha256 == made.tokenizer.sha256 == rows["tokenizer"]
    files = dataclasses.replace(MADE.data, text=str(tmp_path / "*.txt"))
    (tmp_path / "a.txt").write_text("changed")
    told = {**rows, "text": "another", "text_field": "text", "validation_fraction": 0.01}
    del told["dataset"], told["split"]
    with pytest.raises(ValueError, match="the text that it was trained on is another now"):
        tokenizer_of(files, told)
