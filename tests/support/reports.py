"""Builds the directory of a made-up run, and reads back what its report shows."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relora_jax.config import Config
from relora_jax.reporting import drawing, page
from tests.support import small

LAYERS, SIDE, MLP, RANK, UPDATES, START, CYCLE = 2, 24, 40, 3, 400, 100, 60

FACTS = {
    "trained": 1_234_567,
    "frozen": 7_654_321,
    "full_rank_total": 8_000_000,
    "reduction_percent": 84.6,
    "unigram_perplexity": 612.5,
    "versions": {"jax": "1.2.3"},
    "devices": ["cpu:0"],
}


def config(arm: str = "relora", **relora: Any) -> Config:
    relora = {
        "rank": RANK,
        "warm_start_updates": START,
        "cycle_updates": CYCLE,
        "warm_up_updates": 5,
    } | relora
    changes = {f"relora__{key}": value for key, value in relora.items()}
    return small.config(arm, train__updates=UPDATES, relora__restart_warm_up_updates=10, **changes)


def rows(arm: str = "relora", every: int = 2) -> list[dict]:
    """The metrics of a noisy run that learns, with the jagged rate, evaluations and (arm relora) restarts."""
    random, rows, restarts = np.random.default_rng(0), [], 0
    rows.append({"kind": "eval", "update": 0, "loss": 6.3, "perplexity": float(np.exp(6.3)), "tokens": 960})
    for u in range(1, UPDATES + 1):
        s = u - 1 - START
        if arm == "relora" and s > 0 and s % CYCLE == 0:
            rows.append({"kind": "restart", "update": u - 1, "merged": True, "reset": True})
            restarts += 1
        if u % every == 0:
            dip = min(1.0, (s % CYCLE) / 10) if arm == "relora" and s > 0 else 1.0
            lr = 1e-3 * min(1.0, u / 20) * (0.55 + 0.45 * np.cos(np.pi * u / UPDATES)) * dip
            loss = 3.5 + 2.8 * np.exp(-u / 80) + 0.08 * random.standard_normal()
            row = {
                "kind": "train",
                "update": u,
                "loss": loss,
                "lr": lr,
                "grad_norm": 1.0,
                "tokens_seen": 256 * u,
            }
            row |= {
                "tokens_per_s": 4000.0 + u,
                "mfu": u / 1000,
                "peak_bytes": 10**7 * u,
                "restarts": restarts,
                "skipped": 1,
                "elapsed_s": u / 4,
            }
            rows.append(row)
        if u % 50 == 0:
            loss = 3.55 + 2.8 * np.exp(-u / 80)
            rows.append(
                {"kind": "eval", "update": u, "loss": loss, "perplexity": float(np.exp(loss)), "tokens": 960}
            )
    return rows


def make(workdir: Path, *, arm: str = "relora", lines: list[dict] | None = None, **relora) -> Path:
    workdir.mkdir(parents=True, exist_ok=True)
    settings = config(arm, **relora)
    groups = dataclasses.asdict(settings)
    groups["relora"]["prune"] = str(settings.relora.prune)
    (workdir / "config.json").write_text(json.dumps(groups, indent=2))
    (workdir / "run.json").write_text(json.dumps(FACTS))
    lines = rows(arm) if lines is None else lines
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return workdir


def text_of(workdir: Path) -> str:
    return page.write(workdir).read_text(encoding="utf-8")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """The figures that a report draws, by file name; the files themselves are empty."""
    drawn: dict[str, Figure] = {}

    def save(figure: Figure, file: Path) -> None:
        drawn[file.name] = figure
        file.touch()

    monkeypatch.setattr(drawing, "save", save)
    return drawn


def vertical_lines(axes: Axes) -> list[float]:
    """The x positions of the vertical lines."""
    positions = []
    for line in axes.lines:
        x = np.asarray(line.get_xdata(), float)
        if len(x) == 2 and x[0] == x[1]:
            positions.append(float(x[0]))
    return positions
