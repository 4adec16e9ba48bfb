"""pair: the page and the JSON about two runs, and runs that it refuses."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from relora_jax import cli, report
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.saved import DamagedError
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import to_json
from relora_jax.errors import UserError
from relora_jax.reporting import pair, spectrum
from relora_jax.training.program import Program
from tests.support import small
from tests.support.commands import Sandbox
from tests.support.reports import FACTS

ROWS = {"train": {"tokenizer": "a" * 64}, "validation": {"dataset": "c4/en:3.0.1", "tokenizer": "a" * 64}}
ARMS = ("relora", "full")


def make(workdir: pathlib.Path, arm: str, *, rows: Any = ROWS, **changes: Any) -> pathlib.Path:
    """A run without checkpoints."""
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(to_json(small.config(arm, **changes)))
    (workdir / "run.json").write_text(json.dumps(FACTS | {"rows": rows}))
    row = {"kind": "eval", "update": 6, "loss": 4.0, "perplexity": 54.6}
    (workdir / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
    return workdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """A run of each arm, saved at the start of the low-rank phase and two updates later."""
    folder, workdirs = tmp_path_factory.mktemp("runs"), []
    for arm in ARMS:
        config, workdir = small.config(arm, train__keep_last=9), make(folder / arm, arm)
        program, state, start = Program(config, small.mesh()), None, 0
        with Checkpoints(workdir, config) as checkpoints:
            for u in (4, 6):
                state, _ = small.run(config, program, state=state, start=start, stop=u)
                checkpoints.save(u, state)
                checkpoints.wait()
                start = u
        workdirs.append(workdir)
    return workdirs


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(report.main, "", ["report", "--compare", "--workdir", *args])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_page_has_a_section_and_a_picture_for_each_subject(
    runs: list[pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def held_out(_: Any, config: Any, program: Program) -> Any:
        ids, lengths = (part.reshape(8, *part.shape[2:]) for part in small.rows(small.config(), 9))
        return [pair.Batch(*(jax.device_put(part, program.eval_rows) for part in (ids, lengths)))]

    monkeypatch.setattr(pair, "_held_out", held_out)
    for points in ("BETWEEN", "AROUND"):
        monkeypatch.setattr(pair.landscape, points, np.array([0.0, 0.5, 1.0]))
    monkeypatch.setattr(pair, "enable_compilation_cache", lambda: None)  # it sets process-wide options
    page = pair.write(runs, tmp_path / "of two.md")
    text, facts = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        *("## Loss", "## Weights", "## Updates", "## Activations")
    ]
    for name in ("loss", "weights", "updates", "cka"):
        assert f"(of%20two_{name}.png)" in text
        assert imread(tmp_path / f"of two_{name}.png").std() > 0
    assert page.with_suffix(".html").read_text().count("data:image/png") == 4
    assert list(facts["weights"]) == list(facts["updates"]) == list(ARMS)
    ranks = {arm: facts["updates"][arm]["q"]["effective_rank"] for arm in ARMS}
    assert ranks["relora"] < 3.01 < 6 < ranks["full"]  # r = 3; both are 16 x 16
    assert np.shape(facts["cka"]) == (2, 2)
    assert f"| full | full | 6 | {facts['losses']['full']:.4f} |" in text
    assert f"{facts['distance']:.2f} times" in text and len(facts["around"]["full"]) == pair.DIRECTIONS


def test_spectra_of_weights_are_those_of_the_merged_kernels(runs: list[pathlib.Path]) -> None:
    variables = variables_of(runs[0], 6)
    name = "blocks/mlp/up/kernel"
    a, b = variables.factors(name)
    merged = variables[name].astype(np.float64) + 2.0 * a.astype(np.float64) @ b  # alpha / r
    expected = np.linalg.svd(merged, compute_uv=False)
    np.testing.assert_allclose(spectrum.weights(variables)["up"], expected, rtol=1e-5)


def test_runs_that_cannot_be_compared_are_refused(tmp_path: pathlib.Path, capsys: Any) -> None:
    one = str(make(tmp_path / "one", "relora"))
    assert "two runs, not 1" in fails(capsys, one)
    wide = str(make(tmp_path / "wide", "full", model__mlp=32))
    assert "model.mlp: 24 -> 32" in fails(capsys, one, wide)
    other = ROWS | {"validation": ROWS["validation"] | {"tokenizer": "b" * 64}}
    other_text = str(make(tmp_path / "other", "full", rows=other))
    assert "held-out rows: tokenizer" in fails(capsys, one, other_text)
    turned = str(make(tmp_path / "turned", "full", model__rope_theta=5e5))
    assert "model.rope_theta: 10000.0 -> 500000.0" in fails(capsys, one, turned)
    alone = str(make(tmp_path / "alone", "full", data__attend_across_documents=False))
    assert "data.attend_across_documents" in fails(capsys, one, alone)
    begun = ROWS | {"validation": ROWS["validation"] | {"bos": 1}}
    assert "held-out rows: bos" in fails(capsys, one, str(make(tmp_path / "begun", "full", rows=begun)))
    unsaved = str(make(tmp_path / "unsaved", "full"))
    assert "no checkpoint yet" in fails(capsys, one, unsaved)
    assert "must end in .md" in fails(capsys, one, unsaved, "--output=pair.txt")
    for name in ("report.md", "run.md"):
        assert "is among the files of a run" in fails(capsys, one, unsaved, f"--output={unsaved}/{name}")
    assert not list(tmp_path.glob("**/pair*")) and not list(tmp_path.glob("*/*.md"))


def test_damaged_checkpoint_is_one_line(
    runs: list[pathlib.Path], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(*_: Any) -> Any:
        raise DamagedError("the checkpoint at update 6 is damaged")

    monkeypatch.setattr(pair, "_held_out", lambda *_: [])
    monkeypatch.setattr(pair, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(pair.landscape, "merged", damaged)
    with pytest.raises(UserError, match="is damaged: the two cannot be compared"):
        pair.write(runs, tmp_path / "pair.md")


@pytest.mark.slow
def test_command_compares_two_trained_runs(tmp_path: pathlib.Path) -> None:
    sandbox = Sandbox(tmp_path)
    for arm in ARMS:
        finished = sandbox.train(f"--config={tmp_path / 'toy.py'}:{arm}", workdir=arm)
        assert finished.returncode == 0, finished.stderr
    command = [sys.executable, "-m", "relora_jax.report", "--compare", "--workdir", *ARMS]
    compared = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **sandbox.environment}, capture_output=True, text=True
    )
    assert (compared.returncode, compared.stdout) == (0, "pair.md\n"), compared.stderr
    losses = dict(json.loads((tmp_path / "pair.json").read_text())["between"])
    for at, arm in enumerate(ARMS):
        evaluated = sandbox.evaluate("--tokens=16384", "--json", workdir=arm)
        np.testing.assert_allclose(losses[at], json.loads(evaluated.stdout)["loss"], rtol=1e-4)
