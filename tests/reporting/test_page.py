"""page: the report's text and pictures show the numbers in the workdir."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from relora_jax import cli, report
from relora_jax.reporting import page, pictures
from relora_jax.training.names import LAYERS as KINDS
from tests.support.reports import (
    CYCLE,
    LAYERS,
    MLP,
    RANK,
    SIDE,
    START,
    UPDATES,
    make,
    rows,
    text_of,
    vertical_lines,
)


def models(merges: int = 4, targets: str = "qkvo gate up down") -> dict[int, dict[str, np.ndarray]]:
    """Checkpoints at START and UPDATES: `merges` merged updates of rank RANK, and a live one."""
    random = np.random.default_rng(1)
    then, now = {}, {}
    for kind, path in KINDS.items():
        rows, columns = {"gate": (SIDE, MLP), "up": (SIDE, MLP), "down": (MLP, SIDE)}.get(kind, (SIDE, SIDE))
        then[f"{path}/kernel"] = (0.02 * random.standard_normal((LAYERS, rows, columns))).astype(np.float32)
        summed = then[f"{path}/kernel"].astype(np.float64)
        if kind not in targets:
            now[f"{path}/kernel"] = (summed + 0.1 * random.standard_normal(summed.shape)).astype(np.float32)
            continue
        for _ in range(merges + 1):
            a = random.uniform(-1, 1, (LAYERS, rows, RANK)) / np.sqrt(rows)
            b = random.standard_normal((LAYERS, RANK, columns)) * np.geomspace(0.3, 0.03, RANK)[:, None]
            live = 2.0 * a @ b
            summed += live
        now[f"{path}/kernel"] = (summed - live).astype(np.float32)
        now[f"{path}/lora_a"], now[f"{path}/lora_b"] = a.astype(np.float32), b.astype(np.float32)
    return {START: then, UPDATES: now}


def fake_checkpoints(
    monkeypatch: pytest.MonkeyPatch, workdir: Path, models: dict[int, dict[str, np.ndarray]]
) -> None:
    monkeypatch.setattr("relora_jax.checkpoint.saved.updates_saved", lambda workdir: sorted(models))
    read = lambda workdir, update: models[update]  # noqa: E731
    monkeypatch.setattr("relora_jax.checkpoint.variables.variables_of", read)


def facts_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE))


def table_of(text: str) -> dict[str, list[str]]:
    lines = re.findall(r"^\| (\w+) \| (.*) \|$", text[text.index("## Summed update") :], re.MULTILINE)
    return {kind: rest.split(" | ") for kind, rest in lines if kind in KINDS}


def test_report_has_the_numbers_of_the_run_and_every_picture(tmp_path: Path, monkeypatch) -> None:
    workdir = make(tmp_path / "run")
    fake_checkpoints(monkeypatch, workdir, models())
    text = text_of(workdir)
    assert page.write(workdir) == workdir / "report.md"
    facts = facts_of(text)
    # q, k, v and o, gate, up, down of two layers of small.config: (in + out) * 3
    factors = 2 * 3 * (32 + 24 + 24 + 32 + 3 * 40)
    assert facts["trained parameters"] == f"1,234,567, of which {factors:,} are factors"
    assert facts["restart method"] == "merge_and_reinit" and facts["optimizer"] == "adamw"
    assert "of which both are\ntrained" in text
    assert facts["frozen parameters"] == "7,654,321"
    assert (
        facts["reduction in trained parameters"] == "84.6%"
        and facts["tokens seen"] == "102,400"
        and facts["restarts completed"] == "4"
    )
    assert facts["first perplexity"] == "544.6 (update 0)" and facts["unigram perplexity"] == "612.5"
    assert facts["last perplexity"] == f"{np.exp(3.55 + 2.8 * np.exp(-5)):.1f} (update 400)"
    assert (
        facts["skipped updates"] == "1" and facts["tokens/s (median)"] == "4,201" and facts["time"] == "1:40"
    )
    assert facts["MFU (median)"] == "20.1%" and facts["peak memory of a device"] == "4.00 GB"
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == [f"report/{name}.png" for name in ("loss", "learning_rate", "perplexity", "spectrum")]
    for name in pictures:
        assert imread(workdir / name).shape[1] >= 1000
    config = text[text.index("<details>") :]
    assert config.split("```json\n")[1].split("\n```")[0] == (workdir / "config.json").read_text().strip()


def test_ranks_and_counts_are_those_of_the_checkpoints(tmp_path: Path, monkeypatch, figures) -> None:
    workdir = make(tmp_path)
    fake_checkpoints(monkeypatch, workdir, checkpoints := models())
    table = table_of(text_of(workdir))
    assert list(table) == list(KINDS)
    for kind, (side, count, rank, relative) in table.items():
        path = KINDS[kind]
        then, now = checkpoints[START], checkpoints[UPDATES]
        summed = now[f"{path}/kernel"] - then[f"{path}/kernel"].astype(np.float64)
        summed += 6.0 / RANK * now[f"{path}/lora_a"] @ now[f"{path}/lora_b"].astype(np.float64)
        values = np.linalg.svd(summed, compute_uv=False)
        assert count == f"{np.sum(values < 0.1)} of {LAYERS * SIDE}" and side == str(SIDE)
        assert (rank, relative) == (str(5 * RANK), "5.0 r")  # four merged and the live one


def test_only_merges_in_the_checkpoint_count_towards_the_rank_bound(tmp_path, monkeypatch, figures) -> None:
    workdir = make(tmp_path)
    third_restart = START + 3 * CYCLE  # a checkpoint holds the state before the restart at its update
    checkpoints = models(merges=2)
    saved = {START: checkpoints[START], third_restart: checkpoints[UPDATES]}
    fake_checkpoints(monkeypatch, workdir, saved)
    text = text_of(workdir)
    assert (
        "with the 2 merged before it, the sum has rank at most 3 x 3 = 9" in text
        and table_of(text)["q"][2] == "9"
    )
    assert vertical_lines(figures["spectrum.png"].axes[0]) == [RANK, 3 * RANK]


def test_pictures_mark_restarts_warm_start_and_rank(tmp_path: Path, monkeypatch, figures) -> None:
    workdir = make(tmp_path)
    fake_checkpoints(monkeypatch, workdir, models())
    page.write(workdir)
    restarts = [START + CYCLE * n for n in (1, 2, 3, 4)]
    for name in ("loss", "learning_rate", "perplexity"):
        (axes,) = figures[f"{name}.png"].axes
        assert [x for x in vertical_lines(axes) if x] == restarts
        (warm_start,) = axes.patches
        assert (warm_start.get_x(), warm_start.get_width()) == (0, START)
    panels = figures["spectrum.png"].axes
    assert [axes.get_title(loc="left") for axes in panels[:7]] == list(KINDS)
    for axes in panels[:7]:
        assert vertical_lines(axes) == [RANK, 5 * RANK] and axes.get_yscale() == "log"


def test_learning_rate_picture_has_every_dip_however_rarely_a_run_logs(tmp_path: Path, figures) -> None:
    workdir = make(tmp_path, lines=rows(every=50))
    page.write(workdir)
    (curve,) = (line for line in figures["learning_rate.png"].axes[0].lines if len(line.get_xdata()) > 2)
    updates, rates = curve.get_xdata(), np.asarray(curve.get_ydata())
    assert np.array_equal(updates, np.arange(UPDATES))
    assert list(np.flatnonzero(rates == 0)) == [0, START, *(START + CYCLE * n for n in (1, 2, 3, 4))]


def test_loss_picture_has_every_row(tmp_path: Path, figures) -> None:
    page.write(make(tmp_path))
    lines = figures["loss.png"].axes[0].lines
    raw = [(row["update"], row["loss"]) for row in rows() if row["kind"] == "train"]
    evaluations = [(row["update"], row["loss"]) for row in rows() if row["kind"] == "eval"]
    np.testing.assert_allclose(lines[0].get_xydata(), raw)
    np.testing.assert_allclose(lines[2].get_xydata(), evaluations)


def test_kernels_trained_in_full_have_no_line_at_r(tmp_path: Path, monkeypatch, figures) -> None:
    workdir = make(tmp_path, targets=("attention",))
    fake_checkpoints(monkeypatch, workdir, models(targets="qkvo"))
    table = table_of(text_of(workdir))
    assert table["q"][-1] == "5.0 r" and table["gate"][2:] == [str(SIDE), "trained in full"]
    panels = dict(zip(KINDS, figures["spectrum.png"].axes, strict=False))
    assert vertical_lines(panels["q"]) and not vertical_lines(panels["gate"])


@pytest.mark.parametrize("arm", ["full", "control"])
def test_full_rank_arms_are_measured_from_the_same_update(
    tmp_path: Path, monkeypatch, figures, arm: str
) -> None:
    workdir = make(tmp_path, arm=arm)
    fake_checkpoints(monkeypatch, workdir, models(targets=""))
    text = text_of(workdir)
    assert {cells[-1] for cells in table_of(text).values()} == {"trained in full"}
    assert not any(vertical_lines(axes) for axes in figures["spectrum.png"].axes[:7])
    assert not figures["loss.png"].axes[0].patches  # the whole run is full-rank
    head = text[: text.index("## Loss")].replace("restarts completed", "")
    assert "A [in, r]" not in text and "restart" not in head


def test_arms_that_never_merge_end_at_r(tmp_path: Path, monkeypatch, figures) -> None:
    workdir = make(tmp_path, arm="lora_warm")
    fake_checkpoints(monkeypatch, workdir, models(merges=0))
    text = text_of(workdir)
    assert {tuple(cells[2:]) for cells in table_of(text).values()} == {(str(RANK), "1.0 r")}
    assert "restart" not in text[: text.index("## Loss")].replace("restarts completed", "")
    assert all(vertical_lines(axes) == [RANK] for axes in figures["spectrum.png"].axes[:7])


@pytest.mark.parametrize("updates", [(), (START,), (UPDATES,), (START - 50,)])
def test_report_names_the_missing_checkpoint(tmp_path, monkeypatch, figures, updates) -> None:
    workdir = make(tmp_path)
    (workdir / "report").mkdir()
    (workdir / "report" / "spectrum.png").write_bytes(b"of an earlier report")
    fake_checkpoints(monkeypatch, workdir, {update: {} for update in updates})
    text = text_of(workdir)
    reason = "no checkpoint after update 100" if updates == (START,) else "the checkpoint at update 100"
    assert f"Not available: {reason}, where the measurement starts, " in text
    assert "spectrum" not in text and not (workdir / "report" / "spectrum.png").exists()


@pytest.mark.parametrize("fault", ["not finite", "missing kernel", "unreadable"])
def test_unreadable_checkpoint_affects_only_its_section(tmp_path, monkeypatch, figures, fault: str) -> None:
    workdir = make(tmp_path)
    broken: Any = models()
    if fault == "not finite":
        broken[UPDATES]["blocks/mlp/up/kernel"][0, 0, 0] = np.nan
    elif fault == "missing kernel":
        del broken[UPDATES]["blocks/mlp/up/kernel"]
    fake_checkpoints(monkeypatch, workdir, broken)
    if fault == "unreadable":
        failing = lambda *_: (_ for _ in ()).throw(Exception("a\nb"))  # noqa: E731
        monkeypatch.setattr("relora_jax.checkpoint.variables.variables_of", failing)
    text = text_of(workdir)
    assert (
        re.search(r"## Summed update\n\nNot available: .+\.\n", text)
        and "## Loss" in text
        and "<details>" in text
    )


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_one_row_is_enough(tmp_path: Path, kind: str) -> None:
    first = next(row for row in rows() if row["kind"] == kind)
    workdir = make(tmp_path, lines=[first])
    text = text_of(workdir)
    assert facts_of(text)["updates completed"] == f"{first['update']} of 400"
    assert set(re.findall(r"\((report/.*)\)", text)) == {
        f"report/{file.name}" for file in (workdir / "report").iterdir()
    }


def test_non_finite_losses_leave_gaps(tmp_path: Path, figures) -> None:
    lines = [{**row, **{key: None for key in ("loss", "perplexity") if key in row}} for row in rows()]
    text = text_of(make(tmp_path / "all", lines=lines))
    assert "## Loss" not in text and "## Learning rate" in text and "nan (diverged) (update 400) |" in text
    lines[:50] = rows()[:50]
    text_of(make(tmp_path / "some", lines=lines))
    assert max(figures["loss.png"].axes[0].lines[0].get_xdata()) == rows()[49]["update"]


def test_report_of_a_run_that_trains_b_alone_says_so(tmp_path: Path) -> None:
    workdir = make(tmp_path, restart="one_sided")
    text = text_of(workdir)
    assert "of which B alone is\ntrained" in text
    factors = 2 * 3 * (16 + 8 + 8 + 16 + 24 + 24 + 16)
    assert facts_of(text)["trained parameters"].endswith(f", of which {factors:,} are factors")


def test_report_of_a_run_without_facts_shows_dashes(tmp_path: Path, figures) -> None:
    workdir = make(tmp_path)
    (workdir / "run.json").unlink()
    facts = facts_of(text_of(workdir))
    assert facts["trained parameters"] == facts["unigram perplexity"] == facts["devices"] == "-"


def test_smoothing_keeps_lines_straight_and_halves_noise() -> None:
    line = np.linspace(5.0, 3.0, 1000)
    np.testing.assert_allclose(pictures.smoothed(line), line)
    noise = np.random.default_rng(0).standard_normal(1000)
    assert pictures.smoothed(noise).std() < 0.5 * noise.std()
    assert pictures.smoothed(line[:99]) is not line and (pictures.smoothed(line[:99]) == line[:99]).all()


def test_command_writes_the_report_and_prints_its_path(tmp_path: Path, capsys) -> None:
    assert report.main(["report", f"--workdir={make(tmp_path)}"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.md'}\n" and (tmp_path / "report.md").exists()


@pytest.mark.parametrize("case", ["missing", "empty", "a file", "no rows", "another version", "facts"])
def test_command_rejects_a_workdir_without_a_run_in_one_line(tmp_path: Path, capsys, case: str) -> None:
    workdir = tmp_path / "run"
    if case == "empty":
        workdir.mkdir()
    elif case == "a file":
        workdir.write_text("")
    elif case != "missing":
        make(workdir, lines=[] if case == "no rows" else None)
    if case == "another version":
        (workdir / "config.json").write_text("{}")
    if case == "facts":
        (workdir / "run.json").write_text("{")
    with pytest.raises(SystemExit, match="2"):
        cli.main(report.main, "", ["report", f"--workdir={workdir}"])
    out, err = capsys.readouterr()
    messages = {"no rows": "no metrics yet", "another version": "cannot read"}
    messages["facts"] = "run.json is damaged"
    assert out == "" and err.count("\n") == 1 and messages.get(case, "holds no run (no config.json)") in err
    assert not (workdir / "report.md").exists() and not (workdir / "report").exists()


def test_module_is_a_command_and_never_imports_pyplot(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['report', '--workdir={make(tmp_path)}']\n"
        "try: runpy.run_module('relora_jax.report', run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or 'matplotlib.pyplot' in sys.modules)\n"
        "sys.exit(3)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout) == (0, f"{tmp_path / 'report.md'}\n"), process.stderr
