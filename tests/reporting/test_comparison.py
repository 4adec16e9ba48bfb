"""comparison: a row and a curve for each run, and a warning if they cannot be compared."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from relora_jax import cli, report
from relora_jax.config import to_json
from relora_jax.reporting import comparison, page, pictures
from relora_jax.run import record
from tests.support import small
from tests.support.reports import FACTS, figures, vertical_lines  # noqa: F401  (a fixture)

ROWS = {
    "train": {"dataset": "c4/en:3.0.1", "tokenizer": "a" * 64},
    "validation": {"dataset": "c4/en:3.0.1", "tokenizer": "a" * 64},
}


def make(workdir: Path, arm: str = "relora", *, updates: int = 16, tokens: int = 100, **changes: Any) -> Path:
    """A run with `updates` of 16 updates of `tokens` each; the loss after u updates is 4 - u / 10."""
    workdir.mkdir(parents=True)
    facts = {**FACTS, "rows": changes.pop("rows", ROWS)}
    (workdir / "config.json").write_text(to_json(small.config(arm, **changes)))
    (workdir / "run.json").write_text(json.dumps(facts))
    lines = []
    for u in range(updates + 1):
        loss = 4 - u / 10
        if u and u % 2 == 0:
            row = {"loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_seen": tokens * u}
            row |= {"tokens_per_s": 4000.0 + u, "restarts": 0, "skipped": u // 8, "elapsed_s": 5.0 * u}
            lines.append({"kind": "train", "update": u, **row})
        if u % 3 == 0:
            lines.append(
                {"kind": "eval", "update": u, "loss": loss, "perplexity": math.exp(loss), "tokens": 96}
            )
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def diverge(workdir: Path) -> Path:
    """Makes the last evaluation NaN and the one before it worse than the earlier ones."""
    file = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    *_, before, last = [line for line in lines if line["kind"] == "eval"]
    before["perplexity"] = 50.0
    last |= {"loss": None, "perplexity": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return workdir


def table_of(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_table_has_a_row_of_numbers_per_run_next_to_the_picture(tmp_path: Path) -> None:
    runs = [make(tmp_path / "one"), make(tmp_path / "two", "full", tokens=1000)]
    page = comparison.write(runs, tmp_path / "pages" / "all of them.md")
    text = page.read_text(encoding="utf-8")
    table = table_of(text)
    assert table["run"] == list(comparison.HEAD[1:])
    shared = ["1,234,567", "7,654,321", "16"]
    best = f"{math.exp(2.5):,.1f}"
    outcome = [f"{best} (update 15)", f"{best} (update 15)", "4,009", "1:20", "2"]
    assert table["one"] == ["relora", *shared, "1,600", *outcome]
    assert table["two"] == ["full", *shared, "16,000", *outcome]
    assert "not all comparable" not in text and "unfinished" not in text
    (image,) = re.findall(r"!\[.*\]\((.*)\)", text)
    assert image == "all%20of%20them.png"
    assert np.ptp(imread(page.with_suffix(".png"))[..., :3]) > 0.5


def test_curves_are_over_tokens_seen_and_runs_with_the_same_start_share_a_line(
    tmp_path: Path,
    figures,  # noqa: F811
) -> None:
    runs = [make(tmp_path / name) for name in ("a", "b")]
    runs += [
        make(tmp_path / "wide", tokens=1000),
        make(tmp_path / "full", "full"),
        make(tmp_path / "new", updates=3),
    ]
    comparison.write(runs, tmp_path / "comparison.md")
    upper, lower = figures["comparison.png"].axes
    curves = {line.get_label(): line for line in upper.lines if not str(line.get_label()).startswith("_")}
    assert list(curves) == ["a", "b", "wide", "full", "new (unfinished)"]
    # update 9 was evaluated but not logged: its tokens are interpolated from updates 8 and 10
    assert np.array_equal(curves["wide"].get_xdata(), [0, 3000, 6000, 9000, 12000, 15000])
    np.testing.assert_allclose(curves["a"].get_ydata(), np.exp(4 - np.arange(0, 16, 3) / 10))
    losses = {line.get_label(): line for line in lower.lines}
    assert np.array_equal(losses["a"].get_xdata(), 100.0 * np.arange(2, 17, 2))
    (legend,) = figures["comparison.png"].legends
    assert [text.get_text() for text in legend.get_texts()] == list(curves)
    assert vertical_lines(upper) == vertical_lines(lower) == [400.0, 4000.0]
    assert [text.get_text() for text in upper.texts] == ["W = 4: a, b", "W = 4: wide"]
    assert len({line.get_color() for line in curves.values()}) == 5


def test_warning_lists_the_settings_that_make_runs_incomparable(tmp_path: Path) -> None:
    other = json.loads(json.dumps(ROWS))
    other["validation"]["tokenizer"] = "b" * 64
    runs = [
        make(tmp_path / "a"),
        make(tmp_path / "b", rows=other, train__eval_tokens=7, data__attend_across_documents=False),
        make(tmp_path / "c", "full", train__batch=4, data__attend_across_documents=False),
    ]
    text = comparison.write(runs, tmp_path / "c.md").read_text()
    differences = re.findall(r"^- (.*)$", text, re.MULTILINE)
    assert "not all comparable" in text and differences == [
        f"a, c / b: validation tokenizer {'a' * 24} / {'b' * 24}; train.eval_tokens 100 / 7",
        "a / b, c: data.attend_across_documents True / False",
    ]


def test_unfinished_and_diverged_runs_are_labeled(tmp_path: Path) -> None:
    runs = [
        make(tmp_path / "new", updates=8),
        diverge(make(tmp_path / "diverged")),
        make(tmp_path / "first", updates=0),
    ]
    table = table_of(comparison.write(runs, tmp_path / "c.md").read_text())
    assert table["new (unfinished)"][3] == "8 of 16"
    assert table["new (unfinished)"][5] == f"{math.exp(3.4):,.1f} (update 6)"
    assert table["diverged"][5:7] == ["nan (diverged) (update 15)", f"{math.exp(3.1):,.1f} (update 9)"]
    assert table["first (unfinished)"][4:] == [
        "-",
        f"{math.exp(4):,.1f}",
        f"{math.exp(4):,.1f} (update 0)",
        "-",
        "-",
        "-",
    ]


def test_diverged_last_evaluation_is_in_summary_and_report(tmp_path: Path, figures) -> None:  # noqa: F811
    workdir = diverge(make(tmp_path / "diverged"))
    assert record.summary(workdir).startswith(f"perplexity {math.exp(4):,.1f} -> nan (diverged) (unigram")
    text = page.write(workdir).read_text()
    assert "Validation perplexity nan (diverged) after 15 updates." in text
    assert "| last perplexity | nan (diverged) (update 15) |" in text
    assert record.summary(make(tmp_path / "good")).startswith(
        f"perplexity {math.exp(4):,.1f} -> {math.exp(2.5):,.1f} ("
    )


def test_command_accepts_patterns_and_compares_several_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("x/run", "y/run", "z"):
        make(tmp_path / name)
    (tmp_path / "starting" / "run").mkdir(parents=True)
    (tmp_path / "starting" / "run" / "lock").touch()
    assert report.main(["report", "--workdir", "x/run", "y/run", "x/run"]) == 0
    assert report.main(["report", "--workdir=*/run", "--output=pages/two.md"]) == 0
    assert report.main(["report", "--workdir", "z", "--output=one.md"]) == 0
    assert report.main(["report", "--workdir=z"]) == 0
    home = ["report", "--workdir", "~/x/run", "~/*/run", "--output=~/home.md"]
    assert report.main(home) == 0
    assert capsys.readouterr().out.split() == [
        "comparison.md",
        "pages/two.md",
        "one.md",
        "z/report.md",
        f"{tmp_path}/home.md",
    ]
    rows = list(table_of((tmp_path / "home.md").read_text()))
    assert rows == ["run", "---", str(tmp_path / "x/run"), str(tmp_path / "y/run")]
    for name in ("comparison.md", "pages/two.md"):
        assert list(table_of(Path(name).read_text())) == ["run", "---", "x/run", "y/run"], name


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["none*"], "no directory matches 'none*'"),
        (["run", "nothing"], "workdir 'nothing' holds no run"),
        (["run*"], "workdir 'run.txt' holds no run"),
        (["run", "--output=page.png"], "--output 'page.png' is a Markdown page: its name must end in .md"),
        (["run", "--output=run/report.md"], "is the report of one of the runs: choose another name"),
    ],
    ids=str,
)
def test_invalid_workdir_or_output_is_one_line(
    tmp_path: Path, monkeypatch, capsys, args: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "run")
    (tmp_path / "run.txt").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        cli.main(report.main, "", ["report", "--workdir", *args])
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert sorted(tmp_path.iterdir()) == before


def test_colors_repeat_with_other_dashes_after_seven_runs(tmp_path: Path, figures) -> None:  # noqa: F811
    points = [(0.0, 3.0), (10.0, 2.0)]
    pictures.runs(tmp_path / "many.png", [pictures.Curves(str(n), points, points) for n in range(15)], {})
    lines = figures["many.png"].axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 15
