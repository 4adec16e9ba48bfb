"""Trains arms x rates x seeds, tunes each arm's rate, and reports what they say; the same command resumes it.

    python -m relora_jax.study --config=configs/study_small.py [--workdir=runs/NAME] [--arms=full,relora]
        [--extend] [--jobs=N] [--report] [--config.base.GROUP.FIELD=VALUE ...]

Every arm is trained at every rate of its grid with seed 0, then at its best rate with more seeds. A best rate
at the edge of its grid is an error that names the rate to add, or, with --extend, the grid grows by itself,
by at most 4 rates. --jobs: runs side by side, by default one per CPU core or GPU. --report: writes the report
of what has ended, and trains nothing.

Exit codes: 0 finished, 1 a grid must be extended, 2 wrong setting, 74 a run failed, 75 stopped by a signal
(run the same command again). A run that diverges is a result.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.config import check_types
from relora_jax.errors import STOPPED, UserError
from relora_jax.storage.location import local_path
from relora_jax.studies import grid, page, runner
from relora_jax.studies.grid import Run, Study
from relora_jax.studies.results import exp
from relora_jax.validate import check_settings

FLAGS: dict[str, str | bool] = {"workdir": "", "arms": "", "extend": False, "jobs": "0", "report": False}
EXTEND_GRIDS = 1  # the exit code


def main(argv: Sequence[str]) -> int:
    """Trains what is missing, and writes the report; returns the exit code."""
    study, values = cli.parse_as(Study, argv, FLAGS)
    check_types(study.base)
    if values["arms"]:
        study = _with_arms(study, values["arms"].split(","))
    grid.check(study)
    folder = local_path(values["workdir"] or f"runs/{study.name}", flag="--workdir").absolute()
    extend, jobs = values["extend"], cli.count("jobs", values["jobs"], at_least=0)
    for name, arm in study.arms.items():
        check_settings(grid.config(study, Run(name, arm.rates[0], 0), folder))
    extend = extend or values["report"]  # reads what --extend added
    code = 0 if values["report"] else _train(study, folder, extend=extend, jobs=jobs)
    if code:
        return code  # what stopped this may not wait for a report
    results = losses(study, folder, extend=extend)
    if not results:
        raise UserError(f"no run of the study has ended in {folder}: leave out --report to train them")
    print(page.write(study, folder, results, extend=extend))
    edges = grid.edges(study, results, extend=extend)
    for name, rate in edges.items():
        problem = "every rate diverged: add lower ones to its rates"
        if rate:
            problem = f"the best rate is at the edge of the grid: add {rate:g} to its rates"
        print(f"error: arm {name}: {problem}", file=sys.stderr)
    return EXTEND_GRIDS if edges else 0


def losses(study: Study, folder: Path, *, extend: bool) -> dict[Run, float]:
    """The losses of the runs in `folder` that have ended, as far as the study consists of them.

    UserError if one of them had other settings.
    """
    known: dict[Run, float] = {}
    while True:
        ended = [run for run in grid.due(study, known, extend=extend) if runner.outcome(folder / run.name)]
        if not ended:
            return known
        for run in ended:
            runner.check(folder / run.name, grid.config(study, run, folder))
            known[run] = runner.last_loss(folder / run.name)


def _train(study: Study, folder: Path, *, extend: bool, jobs: int) -> int:
    """Trains all that is due; returns the exit code."""
    shared = None
    try:
        while runs := grid.due(study, results := losses(study, folder, extend=extend), extend=extend):
            grid.check_sources(study, results)
            shared = shared or runner.slots(jobs)
            configs = {folder / run.name: grid.config(study, run, folder) for run in runs}
            runner.run_all(configs, shared, done=len(results), total=len(results) + len(runs), ended=_line)
    except KeyboardInterrupt:
        print("stopped: run the same command again to resume", file=sys.stderr)
        return STOPPED
    return 0


def _line(workdir: Path, ended: str) -> str:
    return f"perplexity {exp(runner.last_loss(workdir)):,.1f}" if ended == "finished" else ended


def _with_arms(study: Study, names: Sequence[str]) -> Study:
    if unknown := set(names) - set(study.arms):
        raise UserError(f"--arms: the study has no arm {min(unknown)}: choose from {', '.join(study.arms)}")
    needed = {of(study, name) for name in names for of in (grid.reference_of, grid.warm_start_of)}
    names = [name for name in study.arms if name in {*names, *needed}]
    study.arms = {name: study.arms[name] for name in names}
    return study


if __name__ == "__main__":
    cli.main(main, __doc__)
