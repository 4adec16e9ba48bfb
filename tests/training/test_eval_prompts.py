"""What a model goes on with is written at each evaluation, and read side by side."""

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
from relora_jax.training.eval_prompts import CONTINUATION, EvalPrompts, begun
from relora_jax.training.program import Program
from tests.support import small
from tests.support.documents import texts, write_store
from tests.support.reports import make, rows, text_of

EOS = 1


def store(folder: Path, written: list[list[int]], *, length: int) -> RowStore:
    ids = np.zeros((len(written), length + 1), np.int64)
    for row, its in zip(ids, written, strict=True):
        row[: len(its)] = its
    return write_store(folder / "s", [ids], np.array([*map(len, written)]), vocab_size=50, eos=EOS)


def test_openings_are_the_first_rows_that_reach_their_length_before_an_end(tmp_path: Path) -> None:
    written = [
        [2] * 9,
        [3, 3, EOS, 3, 3, 3],
        [EOS, EOS, 4, 4, 4, 4],
        [5, 5, 5, 5, EOS],
        [6, 6, 6],
        [7] * 9,
    ]
    found = begun(store(tmp_path, written, length=8), count=5, length=4)
    assert [row.tolist() for row in found] == [[2] * 4, [4] * 4, [5] * 4, [7] * 4, [6] * 3]
    assert begun(store(tmp_path / "none", [[EOS]], length=3), count=3, length=4) == []


class Asked(Program):
    """Notes what it is asked for, and goes on with the id 9; the first sample ends one id early."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def sample(self, state: Any, asked: Request) -> Any:
        self.asked.append(asked)
        ids = np.where(np.arange(asked.ids.shape[1]) < asked.lengths[:, None], asked.ids, 9)
        return ids, ids.shape[1] - (np.arange(len(ids)) == 0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "t.model"
    return tokenizer.train(texts(40), kind="bpe", vocab_size=380, path=path)


@pytest.fixture(scope="module")
def state() -> Any:
    return Program(small.config(), small.mesh()).low_rank


@pytest.mark.parametrize("length", [1, 2, 12, 16, 31, 63, 512])
def test_openings_and_what_follows_fit_the_model_whatever_its_length(
    trained: tokenizer.Tokenizer, state: Any, tmp_path: Path, length: int
) -> None:
    written, program = store(tmp_path, [[i] * (length + 1) for i in (3, 4, 5, 6)], length=length), Asked()
    found = EvalPrompts(written, trained).continued(program, state)
    prompt, size = min(16, max(length // 2, 1)), min(length + 1, 16 + CONTINUATION)
    went_on = {3: size - prompt - 1, 4: size - prompt, 5: size - prompt}
    assert ["".join(each) for each in found] == [
        trained.decode([i] * prompt + [9] * count) for i, count in went_on.items()
    ]
    [asked] = program.asked
    assert asked.ids.shape == (3, size) and asked.lengths.tolist() == [prompt] * 3
    assert (asked.vocab_size, asked.eos, asked.pad) == (380, trained.eos, trained.pad)
    assert asked.numbers.tolist() == [0, 1, 2]


def test_run_without_held_out_beginnings_writes_none(
    trained: tokenizer.Tokenizer, state: Any, tmp_path: Path
) -> None:
    assert EvalPrompts(store(tmp_path, [[EOS]], length=3), trained).continued(Asked(), state) == []


def of(*updates: int) -> list[metrics.Row]:
    return [
        {"kind": "sample", "update": u, "prompt": f"p{i}", "text": f"t{i} of {u}"}
        for u in updates
        for i in (1, 2)
    ]


def test_report_ends_with_the_samples_of_the_first_and_the_newest_evaluation(tmp_path: Path) -> None:
    lines = rows()
    text = text_of(make(tmp_path / "two", lines=[*lines[:5], *of(0), *lines[5:], *of(1200, 2400)]))
    assert text.endswith(
        "\n| after 0 updates | after 2,400 updates |\n| --- | --- |\n"
        "| <b>p1</b>t1 of 0 | <b>p1</b>t1 of 2400 |\n| <b>p2</b>t2 of 0 | <b>p2</b>t2 of 2400 |\n"
    )
    text = text_of(make(tmp_path / "one", lines=[*lines, *of(400)]))
    assert text.endswith("\n| after 400 updates |\n| --- |\n| <b>p1</b>t1 of 400 |\n| <b>p2</b>t2 of 400 |\n")
    assert samples.section(record.read(make(tmp_path / "none", lines=lines))) == []


def test_nothing_of_a_text_is_markup_or_leaves_its_cell() -> None:
    text = "a | b\\|\n\n# `c` **d** _e_ ~~f~~ [g](h) ![i](j) <b>k</b> &amp; $l$\r\v\x1b[0m\u202e\u2028\u2029m"
    shown = samples.shown(text)
    left = re.sub(r"&#\d+;|<br>", "", shown)
    assert left.isprintable() and not set(left) & set("|\\`*_~[]<>&$")
    plain = html.unescape(shown.replace("<br>", "\n"))
    assert plain == re.sub("[\r\v\x1b\u202e\u2028\u2029]", " ", text)
