"""Runs side by side, from their directories alone: a table of one row each, and a picture over tokens seen.

python -m relora_jax.report --workdir runs/* --output=comparison.md
"""

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from relora_jax.errors import UserError
from relora_jax.reporting import html, pictures
from relora_jax.reporting.samples import shown
from relora_jax.run import metrics_file
from relora_jax.run.format import duration, number
from relora_jax.run.record import LOCK, REPORT, Run, read
from relora_jax.storage import atomic

HEAD = (
    "run",
    "arm",
    "trained",
    "frozen",
    "updates",
    "tokens seen",
    "perplexity at last",
    "best",
    "tokens/s",
    "time",
    "skipped",
)
NOT_COMPARABLE = """\
**Not all of these can be compared.** What follows decides what was read or which targets are counted, and
differs between them:
"""
NOTE = """\
Tokens seen are the targets that were trained on, perplexity is exp(loss) on held-out text, and tokens/s the
median of a run. A vertical line is where the low-rank phase of the runs named at it begins, after W updates.
"""


def places(words: Sequence[str]) -> list[Path]:
    """Directories as given, and those that patterns match, each once. UserError where none matches.

    A run that has not begun is left out beside others: its directory holds the lock alone.
    """
    found: dict[Path, None] = {}
    for word in words:
        matches = [word] if Path(word).exists() or not glob.has_magic(word) else sorted(glob.glob(word))
        if not matches:
            raise UserError(f"no directory matches {word!r}: give those of runs, such as runs/*")
        found |= dict.fromkeys(map(Path, matches))
    return [path for path in found if _begun(path)] or list(found)


def _begun(path: Path) -> bool:
    return not path.is_dir() or [one.name for one in path.iterdir()] != [LOCK]


def write(workdirs: Sequence[Path], output: Path) -> Path:
    """`output`, a page in Markdown; beside it its picture, and both in one .html. UserError for no run."""
    if output.suffix != ".md":
        raise UserError(f"--output {str(output)!r} is a page in Markdown: let its name end in .md")
    if output.resolve() in {(workdir / REPORT).resolve() for workdir in workdirs}:
        raise UserError(f"--output {str(output)!r} is the report of one of the runs: give it another name")
    runs = _named([read(workdir) for workdir in workdirs])
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
    """(tokens seen, value) of the rows of one kind, those without a finite value left out."""
    return [(_tokens_at(run, update), value) for update, value in run.points(kind, key)]


def _tokens_at(run: Run, update: int) -> float:
    """Tokens seen after so many updates: those of its train row, or between those of the rows around it."""
    seen = run.points("train", "tokens_seen")
    return float(np.interp(update, [0, *(u for u, _ in seen)], [0, *(tokens for _, tokens in seen)]))


def _named(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by the name of their directory, or its path where two share it; unfinished ones say so."""
    names = [run.workdir.absolute().name for run in runs]
    plain = [str(r.workdir) if names.count(n) > 1 else n for n, r in zip(names, runs, strict=True)]
    return {
        name if _done(run) == run.config.train.updates else f"{name} (unfinished)": run
        for name, run in zip(plain, runs, strict=True)
    }


def _done(run: Run) -> int:
    return run.rows[-1]["update"]


def _starts(runs: dict[str, Run]) -> dict[str, float]:
    """ "W = ...: the runs that share it" -> the tokens that they had seen by then."""
    shared: dict[tuple[int, float], list[str]] = {}
    for name, run in runs.items():
        if run.low_rank and 0 < run.low_rank_start <= _done(run):
            tokens = _tokens_at(run, run.low_rank_start)
            shared.setdefault((run.low_rank_start, tokens), []).append(name)
    told = {at: ", ".join(names[:3]) + (", ..." if names[3:] else "") for at, names in shared.items()}
    return {f"W = {start:,}: {names}": tokens for (start, tokens), names in told.items()}


def _table(runs: dict[str, Run]) -> str:
    lines = [HEAD, ("---", "---", *("---:",) * (len(HEAD) - 2))]
    lines += [(shown(name), *_row(run)) for name, run in runs.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(run: Run) -> list[str]:
    train, told = run.of("train"), run.perplexities()
    last: dict[str, Any] = train[-1] if train else {}
    done, total = _done(run), run.config.train.updates
    finite = run.points("eval", "perplexity")
    best = min(finite, key=lambda point: point[1]) if finite else None
    return [
        run.config.arm,
        number(run.facts.get("trained"), ","),
        number(run.facts.get("frozen"), ","),
        f"{done:,}" if done == total else f"{done:,} of {total:,}",
        number(last.get("tokens_seen"), ","),
        "-" if not told else told[-1][1] + (f" (update {told[-1][0]:,})" if told[-1][0] < done else ""),
        f"{best[1]:,.1f} (update {best[0]:,})" if best else "-",
        number(metrics_file.tokens_per_s(run.rows), ",.0f"),
        duration(last["elapsed_s"]) if train else "-",
        number(last.get("skipped"), ","),
    ]


def _differences(runs: dict[str, Run]) -> list[str]:
    """The warning, and a line for each fact in which the runs read or count differently; else nothing."""
    facts = {name: _read_and_counted(run) for name, run in runs.items()}
    lines = []
    for key in dict.fromkeys(key for each in facts.values() for key in each):
        values: dict[str, list[str]] = {}
        for name, each in facts.items():
            values.setdefault(str(each.get(key, "-")), []).append(name)
        if len(values) > 1:
            # the first characters of a hash tell which it is
            told = [f"{shown(value[:24])} in {shown(', '.join(names))}" for value, names in values.items()]
            lines.append(f"- {key}: {'; '.join(told)}")
    return [NOT_COMPARABLE, "\n".join(lines) + "\n"] if lines else []


def _read_and_counted(run: Run) -> dict[str, Any]:
    rows = run.facts.get("rows", {})
    facts = {f"{split} {key}": value for split, keys in rows.items() for key, value in keys.items()}
    return facts | {
        "train.eval_tokens": run.config.train.eval_tokens,
        "data.attend_across_documents": run.config.data.attend_across_documents,
    }
