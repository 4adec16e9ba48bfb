"""The quickstart, shortened: from the text package to the report, as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from relora_jax.reporting import samples
from relora_jax.run import goodput, metrics_file

ROOT = pathlib.Path(__file__).parent.parent
SHORT = {
    "train": "updates=20 evaluate_every_updates=10 save_every_updates=10 log_every_updates=1"
    " eval_tokens=4096",
    "relora": "warm_start_updates=6 cycle_updates=5 warm_up_updates=2 restart_warm_up_updates=2 rank=4",
    "optimizer": "warm_up_updates=2",
    "model": "hidden=32 head_dim=8 mlp=64 layers=2",
}


def test_quickstart_goes_from_text_to_report(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "c"), "TFDS_DATA_DIR": str(tmp_path / "d")}
    command = [sys.executable, "-m", "relora_jax.train", "--config=configs/quickstart.py"]
    command += [f"--config.{group}.{setting}" for group, line in SHORT.items() for setting in line.split()]

    def train() -> subprocess.CompletedProcess[str]:
        args = [*command, f"--workdir={tmp_path / 'run'}"]
        return subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)

    first = train()
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    opening, *_, ending = first.stdout.strip().splitlines()
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert f"trains {facts['trained']:,} parameters and freezes {facts['frozen']:,}" in opening
    assert "reduction" in opening and ending.startswith("perplexity ")
    assert "unigram distribution" in ending
    rows = metrics_file.read(tmp_path / "run")
    assert [r["update"] for r in rows if r["kind"] == "eval"] == [0, 10, 20]
    assert [r["update"] for r in rows if r["kind"] == "restart"] == [11, 16]
    assert [r["update"] for r in rows if r["kind"] == "train"] == list(range(1, 21))
    *_, last, evaluated, _, _, sample = rows
    assert evaluated["perplexity"] < rows[0]["perplexity"]
    assert last["tokens_seen"] == 20 * 16 * 64 and last["restarts"] == 2
    assert [r["update"] for r in rows if r["kind"] == "sample"] == [u for u in (0, 10, 20) for _ in range(3)]
    assert len({r["prompt"] for r in rows if r["kind"] == "sample"}) == 3
    times = goodput.read(tmp_path / "run")
    lost_to = [cause for cause, seconds in times.lost_s.items() if seconds > 0]
    assert lost_to == ["start", "compile", "data", "evaluation", "save", "restart"]
    assert last["elapsed_s"] <= times.elapsed_s and sum(times.lost_s.values()) < times.elapsed_s
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"| goodput | {times} |" in report
    assert "| after 0 updates | after 20 updates |" in report
    assert report.endswith(f"<b>{samples.escape(sample['prompt'])}</b>{samples.escape(sample['text'])} |\n")
    for picture in ("loss", "learning_rate", "perplexity", "spectrum"):
        assert (
            f"report/{picture}.png" in report
            and (tmp_path / "run" / "report" / f"{picture}.png").stat().st_size
        )
    assert any((tmp_path / "c" / "relora_jax" / "xla").iterdir())  # so the next start compiles nothing
    again = train()
    assert again.returncode == 0 and "is finished" in again.stdout and not again.stderr


@pytest.mark.parametrize(
    "name", ["350m", *(pytest.param(n, marks=pytest.mark.slow) for n in ("60m", "130m", "250m", "1b"))]
)
def test_published_size_without_its_data_names_what_is_missing(name: str, tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "c"), "TFDS_DATA_DIR": str(tmp_path / "d")}
    args = [sys.executable, "-m", "relora_jax.train", f"--config=configs/{name}.py"]
    args += [f"--workdir={tmp_path / 'r'}"]
    run = subprocess.run(args, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 2 and run.stderr.count("\n") == 1
    assert "c4/en" in run.stderr and str(tmp_path / "d") in run.stderr
    assert not (tmp_path / "r").exists()
