"""A run's directory as values: what config.json, run.json and metrics.jsonl say."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from relora_jax.config import LOW_RANK_ARMS, Config, from_json
from relora_jax.errors import UserError
from relora_jax.run import metrics_file
from relora_jax.run.format import number
from relora_jax.run.metrics_file import Row

CONFIG, FACTS, REPORT, LOCK = "config.json", "run.json", "report.md", "lock"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run; `facts` is run.json, `rows` are those of metrics.jsonl."""

    workdir: Path
    config: Config
    facts: dict[str, Any]
    rows: list[Row]

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def points(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(update, value) of the rows of one kind, those without a finite value left out."""
        return [(row["update"], row[key]) for row in self.of(kind) if row[key] is not None]

    def perplexities(self) -> list[tuple[int, str]]:
        """(update, perplexity in words) of each evaluation; one that is no number is told as diverged."""
        words = lambda value: "nan (diverged)" if value is None else f"{value:,.1f}"  # noqa: E731
        return [(row["update"], words(row["perplexity"])) for row in self.of("eval")]

    @property
    def low_rank(self) -> bool:
        """Whether the arm has a low-rank phase."""
        return self.config.arm in LOW_RANK_ARMS

    @property
    def low_rank_start(self) -> int:
        """W: the update that the summed update is measured from, in every arm."""
        return self.config.relora.warm_start_updates


def read(workdir: Path) -> Run:
    """The run in `workdir`. UserError where there is none, or one that has not written a row."""
    workdir = Path(workdir)
    config, facts = read_config(workdir), read_facts(workdir)
    rows = metrics_file.read(workdir)
    if not rows:
        raise UserError(f"the run in {str(workdir)!r} has no metrics yet: let it train a little first")
    return Run(workdir, config, facts, rows)


def read_config(workdir: Path) -> Config:
    """The config of the run in `workdir`. UserError where there is none, or not as it was written."""
    saved = workdir / CONFIG
    if not saved.is_file():
        raise UserError(f"workdir {str(workdir)!r} holds no run (no config.json): give a run's --workdir")
    try:
        return from_json(saved.read_text(encoding="utf-8", errors="replace"))
    except UserError as error:
        raise UserError(f"{saved}: {error}: take another --workdir, or bring the file back") from error


def read_facts(workdir: Path) -> dict[str, Any]:
    """What `directory.begin` wrote; empty where it did not. UserError where it is not as it was written."""
    file = Path(workdir) / FACTS
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_text(encoding="utf-8", errors="replace"))
        if not all(isinstance(keys, dict) for keys in facts.get("rows", {}).values()):
            raise TypeError("rows of another kind")
        if not isinstance(facts.get("special", {}), dict):
            raise TypeError("special ids of another kind")
    except (TypeError, AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"{file} is not as it was written ({error}): bring it back") from error
    return facts


def summary(workdir: Path) -> str:
    """Perplexity before and after, the unigram distribution's, tokens/s, and where the report is."""
    run = read(workdir)
    told = [words for _, words in run.perplexities()] or ["-"]
    unigram, speed = run.facts.get("unigram_perplexity"), metrics_file.tokens_per_s(run.rows)
    return (
        f"perplexity {told[0]} -> {told[-1]} (unigram distribution {number(unigram, ',.1f')}), "
        f"{number(speed, ',.0f')} tokens/s, report {run.workdir / REPORT}"
    )
