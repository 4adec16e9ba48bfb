"""Compares runs from their directories: a table with one row per run, and a picture over tokens seen.

python -m relora_jax.report --workdir runs/* --output=comparison.md
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from relora_jax.errors import UserError
from relora_jax.reporting import html, pictures
from relora_jax.reporting.samples import escape
from relora_jax.run import metrics_file
from relora_jax.run.format import duration, number
from relora_jax.run.record import LOCK, REPORT, Run, read
from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath, any_path, entries, is_remote

HEAD = (
    "run",
    "arm",
    "trained",
    "frozen",
    "updates",
    "tokens seen",
    "last perplexity",
    "best perplexity",
    "tokens/s",
    "time",
    "skipped",
)
NOT_COMPARABLE = """\
**These runs are not all comparable.** They differ in settings that decide which text is read or which
targets are counted:
"""
NOTE = """\
Tokens seen are the targets trained on, perplexity is exp(loss) on held-out text, and tokens/s is the median
over a run. A vertical line marks the start of the low-rank phase, after W updates, of the runs named next
to it.
"""


def find_workdirs(patterns: Sequence[str]) -> list[AnyPath]:
    """The workdirs that paths and glob patterns name, each once. UserError if a pattern matches nothing.

    Runs that have not started, whose workdir holds only the lock, are skipped unless there are no others.
    """
    workdirs: dict[AnyPath, None] = {}
    for pattern in map(os.path.expanduser, patterns):
        path = any_path(pattern) if "://" in pattern else Path(pattern)
        literal = path.exists() or not glob.has_magic(pattern)
        matches = [path] if literal else _matching(path)
        if not matches:
            raise UserError(f"no directory matches {pattern!r}: pass the workdirs of runs, such as runs/*")
        workdirs |= dict.fromkeys(matches)
    return [path for path in workdirs if _has_started(path)] or list(workdirs)


def _matching(pattern: AnyPath) -> list[AnyPath]:
    """The paths that match a glob pattern, sorted."""
    if is_remote(pattern):
        bucket = pattern.parents[-3]  # below gs:// and /
        return sorted(bucket.glob(str(pattern.relative_to(bucket))))
    return [Path(path) for path in sorted(glob.glob(str(pattern)))]


def _has_started(workdir: AnyPath) -> bool:
    return [path.name for path in entries(workdir)] != [LOCK]


def write(workdirs: Sequence[AnyPath], output: AnyPath) -> AnyPath:
    """Writes the Markdown page `output`, with its picture and an .html copy next to it; returns `output`."""
    if output.suffix != ".md":
        raise UserError(f"--output {str(output)!r} is a Markdown page: its name must end in .md")
    if output.resolve() in {(workdir / REPORT).resolve() for workdir in workdirs}:
        raise UserError(f"--output {str(output)!r} is the report of one of the runs: choose another name")
    runs = _by_name([read(workdir) for workdir in workdirs])
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = output.with_suffix(".png")
    curves = [
        pictures.Curves(name, over_tokens(run, "train", "loss"), over_tokens(run, "eval", "perplexity"))
        for name, run in runs.items()
    ]
    pictures.runs(picture, curves, _starts(runs))
    image = f"![Perplexity and loss of the runs over tokens seen]({quote(picture.name)})\n"
    parts = ["# Runs\n", _table(runs), *_differences(runs), NOTE, image]
    text = "\n".join(parts)
    html.write(output.with_suffix(".html"), text)
    atomic.write(output, text.encode())
    return output


def over_tokens(run: Run, kind: str, key: str) -> list[tuple[float, float]]:
    """(tokens seen, value) of the rows of one kind that have a finite value."""
    return [(_tokens_at(run, update), value) for update, value in run.points(kind, key)]


def _tokens_at(run: Run, update: int) -> float:
    """Tokens seen after `update` updates, interpolated between train rows."""
    updates, tokens = zip((0, 0), *run.points("train", "tokens_seen"), strict=True)
    return float(np.interp(update, updates, tokens))


def _by_name(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by directory name, or by path if two runs share a name; unfinished runs are labeled."""
    names = [run.workdir.name or run.workdir.absolute().name for run in runs]
    labels = [str(r.workdir) if names.count(n) > 1 else n for n, r in zip(names, runs, strict=True)]
    return {
        label if _last_update(run) == run.config.train.updates else f"{label} (unfinished)": run
        for label, run in zip(labels, runs, strict=True)
    }


def _last_update(run: Run) -> int:
    return run.rows[-1]["update"]


def _starts(runs: dict[str, Run]) -> dict[str, float]:
    """{"W = ...: names of the runs": tokens seen at W}, for the start of each low-rank phase."""
    shared: dict[tuple[int, float], list[str]] = {}
    for name, run in runs.items():
        if run.low_rank and 0 < run.low_rank_start <= _last_update(run):
            tokens = _tokens_at(run, run.low_rank_start)
            shared.setdefault((run.low_rank_start, tokens), []).append(name)
    labels = {}
    for (start, tokens), names in shared.items():
        more = ", ..." if len(names) > 3 else ""
        labels[f"W = {start:,}: {', '.join(names[:3])}{more}"] = tokens
    return labels


def _table(runs: dict[str, Run]) -> str:
    lines = [HEAD, ("---", "---", *("---:",) * (len(HEAD) - 2))]
    lines += [(escape(name), *_row(run)) for name, run in runs.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(run: Run) -> list[str]:
    train, perplexities = run.of("train"), run.perplexities()
    last: dict[str, Any] = train[-1] if train else {}
    update, total = _last_update(run), run.config.train.updates
    finite = run.points("eval", "perplexity")
    best = min(finite, key=lambda point: point[1]) if finite else None
    last_perplexity = "-"
    if perplexities:
        evaluated_at, last_perplexity = perplexities[-1]
        last_perplexity += f" (update {evaluated_at:,})" if evaluated_at < update else ""
    return [
        run.config.arm,
        number(run.facts.get("trained"), ","),
        number(run.facts.get("frozen"), ","),
        f"{update:,}" if update == total else f"{update:,} of {total:,}",
        number(last.get("tokens_seen"), ","),
        last_perplexity,
        f"{best[1]:,.1f} (update {best[0]:,})" if best else "-",
        number(metrics_file.median(run.rows, "tokens_per_s"), ",.0f"),
        duration(last["elapsed_s"]) if train else "-",
        number(last.get("skipped"), ","),
    ]


def _differences(runs: dict[str, Run]) -> list[str]:
    """A warning if settings make the runs incomparable, with a line for each division of the runs."""
    facts = {name: _data_facts(run) for name, run in runs.items()}
    lines: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for each in facts.values() for key in each):
        values: dict[str, list[str]] = {}
        for name, each in facts.items():
            values.setdefault(str(each.get(key, "-")), []).append(name)
        if len(values) > 1:
            groups = " / ".join(escape(", ".join(names)) for names in values.values())
            # the first characters identify a hash
            values_text = " / ".join(escape(value[:24]) for value in values)
            lines.setdefault(groups, []).append(f"{key} {values_text}")
    text = "".join(f"- {groups}: {'; '.join(keys)}\n" for groups, keys in lines.items())
    return [NOT_COMPARABLE, text] if lines else []


def _data_facts(run: Run) -> dict[str, Any]:
    rows = run.facts.get("rows", {})
    facts = {f"{split} {key}": value for split, keys in rows.items() for key, value in keys.items()}
    return facts | {
        "train.eval_tokens": run.config.train.eval_tokens,
        "data.attend_across_documents": run.config.data.attend_across_documents,
    }
