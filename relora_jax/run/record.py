"""Reads a run's config.json, run.json and metrics.jsonl."""

import dataclasses
import json
from typing import Any

from relora_jax.config import LOW_RANK_ARMS, Config, from_json
from relora_jax.errors import UserError
from relora_jax.run import metrics_file
from relora_jax.run.format import number
from relora_jax.run.metrics_file import Row
from relora_jax.storage.location import AnyPath

CONFIG, FACTS, REPORT, LOCK = "config.json", "run.json", "report.md", "lock"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run; `facts` is the content of run.json, `rows` that of metrics.jsonl."""

    workdir: AnyPath
    config: Config
    facts: dict[str, Any]
    rows: list[Row]

    def of(self, kind: str) -> list[Row]:
        """The rows of one kind, in order."""
        return [row for row in self.rows if row["kind"] == kind]

    def points(self, kind: str, key: str) -> list[tuple[int, float]]:
        """(update, value) of the rows of one kind that have a finite value."""
        return [(row["update"], row[key]) for row in self.of(kind) if row[key] is not None]

    def perplexities(self) -> list[tuple[int, str]]:
        """(update, formatted perplexity) of each evaluation; "nan (diverged)" if it is not finite."""
        text = lambda value: "nan (diverged)" if value is None else f"{value:,.1f}"  # noqa: E731
        return [(row["update"], text(row["perplexity"])) for row in self.of("eval")]

    @property
    def low_rank(self) -> bool:
        """Whether the arm has a low-rank phase."""
        return self.config.arm in LOW_RANK_ARMS

    @property
    def low_rank_start(self) -> int:
        """W, from which the summed update is measured, in every arm."""
        return self.config.relora.warm_start_updates


def read(workdir: AnyPath) -> Run:
    """The run in `workdir`. UserError if there is none, or if it has no rows yet."""
    config, facts = read_config(workdir), read_facts(workdir)
    rows = metrics_file.read(workdir)
    if not rows:
        raise UserError(f"the run in {str(workdir)!r} has no metrics yet: let it train first")
    return Run(workdir, config, facts, rows)


def read_config(workdir: AnyPath) -> Config:
    """The config of the run in `workdir`. UserError if there is none, or if it cannot be read."""
    saved = workdir / CONFIG
    if not saved.is_file():
        raise UserError(
            f"workdir {str(workdir)!r} holds no run (no config.json): pass the --workdir of a run"
        )
    try:
        return from_json(saved.read_bytes().decode("utf-8", errors="replace"))
    except UserError as error:
        raise UserError(f"{saved}: {error}: use another --workdir, or restore the file") from error


def read_facts(workdir: AnyPath) -> dict[str, Any]:
    """The content of run.json (see `directory.begin`); {} if it is missing. UserError if it is damaged."""
    file = workdir / FACTS
    if not file.is_file():
        return {}
    try:
        facts = json.loads(file.read_bytes().decode("utf-8", errors="replace"))
        if not all(isinstance(keys, dict) for keys in facts.get("rows", {}).values()):
            raise TypeError("rows is not of dicts")
        if not isinstance(facts.get("special", {}), dict):
            raise TypeError("special is not a dict")
    except (TypeError, AttributeError, RecursionError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): restore the file") from error
    return facts


def summary(workdir: AnyPath) -> str:
    """First and last perplexity, the unigram distribution's, tokens/s, and the path of the report."""
    run = read(workdir)
    perplexities = [text for _, text in run.perplexities()] or ["-"]
    unigram, speed = run.facts.get("unigram_perplexity"), metrics_file.median(run.rows, "tokens_per_s")
    return (
        f"perplexity {perplexities[0]} -> {perplexities[-1]} "
        f"(unigram distribution {number(unigram, ',.1f')}), "
        f"{number(speed, ',.0f')} tokens/s, report {run.workdir / REPORT}"
    )
