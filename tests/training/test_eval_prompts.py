"""Prompts are continued at each evaluation and shown next to each other in the report."""

import html
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relora_jax.data.rows import RowStore
from relora_jax.model.sampling import Request
from relora_jax.reporting import samples
from relora_jax.run import metrics, record
from relora_jax.tokenizer import tokenizer
from relora_jax.training.eval_prompts import CONTINUATION, EvalPrompts, select_prompts
from relora_jax.training.program import Program
from tests.support import small
from tests.support.documents import texts, write_store
from tests.support.reports import make, rows, text_of

EOS = 1


def store(folder: Path, rows: list[list[int]], *, length: int) -> RowStore:
    ids = np.zeros((len(rows), length + 1), np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return write_store(folder / "s", [ids], np.array([*map(len, rows)]), vocab_size=50, eos=EOS)


def test_prompts_are_the_longest_beginnings_of_the_first_rows(tmp_path: Path) -> None:
    rows = [
        [2] * 9,
        [3, 3, EOS, 3, 3, 3],
        [EOS, EOS, 4, 4, 4, 4],
        [5, 5, 5, 5, EOS],
        [6, 6, 6],
        [7] * 9,
    ]
    prompts = select_prompts(store(tmp_path, rows, length=8), count=5, length=4)
    assert [row.tolist() for row in prompts] == [[2] * 4, [4] * 4, [5] * 4, [7] * 4, [6] * 3]
    assert select_prompts(store(tmp_path / "none", [[EOS]], length=3), count=3, length=4) == []


class FakeProgram(Program):
    """Records its requests and continues with id 9; the first sample ends one id early."""

    def __init__(self) -> None:
        self.requests: list[Request] = []

    def sample(self, state: Any, request: Request) -> Any:
        self.requests.append(request)
        ids = np.where(np.arange(request.ids.shape[1]) < request.lengths[:, None], request.ids, 9)
        return ids, ids.shape[1] - (np.arange(len(ids)) == 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return tokenizer.train(texts(40), kind="bpe", vocab_size=380, path=path)


@pytest.fixture(scope="module")
def state() -> Any:
    return Program(small.config(), small.mesh()).low_rank


@pytest.mark.parametrize("length", [1, 2, 12, 16, 31, 63, 512])
def test_prompts_and_continuations_fit_any_sequence_length(
    trained: tokenizer.Tokenizer, state: Any, tmp_path: Path, length: int
) -> None:
    rows, program = store(tmp_path, [[i] * (length + 1) for i in (3, 4, 5, 6)], length=length), FakeProgram()
    samples = EvalPrompts(rows, trained).continuations(program, state)
    prompt, size = min(16, max(length // 2, 1)), min(length + 1, 16 + CONTINUATION)
    counts = {3: size - prompt - 1, 4: size - prompt, 5: size - prompt}
    assert ["".join(each) for each in samples] == [
        trained.decode([i] * prompt + [9] * count) for i, count in counts.items()
    ]
    [request] = program.requests
    assert request.ids.shape == (3, size) and request.lengths.tolist() == [prompt] * 3
    assert (request.vocab_size, [*request.eos], request.pad) == (380, [trained.eos], trained.pad)
    assert request.numbers.tolist() == [0, 1, 2]


def test_no_prompts_give_no_continuations(trained: tokenizer.Tokenizer, state: Any, tmp_path: Path) -> None:
    assert EvalPrompts(store(tmp_path, [[EOS]], length=3), trained).continuations(FakeProgram(), state) == []


def sample_rows(*updates: int) -> list[metrics.Row]:
    return [
        {"kind": "sample", "update": u, "prompt": f"p{i}", "text": f"t{i} of {u}"}
        for u in updates
        for i in (1, 2)
    ]


def test_report_ends_with_the_samples_of_the_first_and_the_newest_evaluation(tmp_path: Path) -> None:
    lines = rows()
    text = text_of(
        make(tmp_path / "two", lines=[*lines[:5], *sample_rows(0), *lines[5:], *sample_rows(1200, 2400)])
    )
    assert text.endswith(
        "\n| after 0 updates | after 2,400 updates |\n| --- | --- |\n"
        "| <b>p1</b>t1 of 0 | <b>p1</b>t1 of 2400 |\n| <b>p2</b>t2 of 0 | <b>p2</b>t2 of 2400 |\n"
    )
    text = text_of(make(tmp_path / "one", lines=[*lines, *sample_rows(400)]))
    assert text.endswith("\n| after 400 updates |\n| --- |\n| <b>p1</b>t1 of 400 |\n| <b>p2</b>t2 of 400 |\n")
    assert samples.section(record.read(make(tmp_path / "none", lines=lines))) == []


def test_text_is_escaped_and_stays_in_its_cell() -> None:
    text = "a | b\\|\n\n# `c` **d** _e_ ~~f~~ [g](h) ![i](j) <b>k</b> &amp; $l$\r\v\x1b[0m\u202e\u2028\u2029m"
    shown = samples.escape(text)
    rest = re.sub(r"&#\d+;|<br>", "", shown)
    assert rest.isprintable() and not set(rest) & set("|\\`*_~[]<>&$")
    plain = html.unescape(shown.replace("<br>", "\n"))
    assert plain == re.sub("[\r\v\x1b\u202e\u2028\u2029]", " ", text)
