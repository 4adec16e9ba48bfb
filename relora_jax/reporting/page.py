"""A run's directory -> its report.md with pictures, and the same in one file, report.html."""

from pathlib import Path
from typing import Any

import numpy as np

from relora_jax.errors import UserError
from relora_jax.reporting import html, pictures, samples, spectrum
from relora_jax.run import metrics_file
from relora_jax.run.format import duration, number
from relora_jax.run.record import CONFIG, REPORT, Run, read
from relora_jax.storage import atomic
from relora_jax.training import names

ARMS = {
    "full": "every kernel trained, the yardstick",
    "control": "full-rank, with as many parameters as the low-rank run trains",
    "lora": "one low-rank update for the whole run, never merged",
    "lora_warm": "a full-rank warm start, then one low-rank update, never merged",
    "relora": "low-rank updates, merged into the frozen kernels at every restart",
}


FACTORS = """
Each target kernel W is frozen, and only a thin pair of factors beside it, A [in, r] and B [r, out], is
trained: the layer computes x W + (alpha / r) x A B. Embeddings, norms and the head are trained in full
throughout. One such low-rank update moves W in at most r directions.
"""


RESTARTS = """\
ReLoRA therefore restarts: the product is merged into W, the factors begin anew and Adam's memory of the old
ones is pruned. The sum of many low-rank updates can reach a high rank.
"""


def write(workdir: Path) -> Path:
    """workdir/report.md, report.html and report/*.png from what the run, which may go on, has written so far.

    The path of report.md, which comes last: where it lies, the others do.
    UserError where `workdir` holds no run.
    """
    run = read(workdir)
    folder = run.workdir / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    parts = [_title(run), _facts(run), *_curves(run, folder), _summed_update(run, folder), _config(run)]
    parts += samples.section(run)
    report = run.workdir / REPORT
    text = "\n".join(parts)
    html.write(report.with_suffix(".html"), text)
    atomic.write(report, text.encode())
    return report


def _title(run: Run) -> str:
    """Name, arm and result in a sentence; for the low-rank arms the method in five."""
    text = f"`{run.config.arm}`: {ARMS[run.config.arm]}."
    unigram, found = run.facts.get("unigram_perplexity"), run.of("eval")
    if found:
        last, (update, told) = found[-1]["perplexity"], run.perplexities()[-1]
        text += f" Validation perplexity {told} after {update:,} updates"
        known = f"{last / unigram:.2f} of what the pieces' frequencies alone give" if last and unigram else ""
        text += f", {known}." if known else "."
    method = (FACTORS if run.low_rank else "") + (RESTARTS if run.config.arm == "relora" else "")
    return f"# {samples.shown(run.config.name)}, arm {run.config.arm}\n\n{text}\n{method}"


def _facts(run: Run) -> str:
    table = _settings(run) | _outcome(run)
    return "| | |\n|---|---|\n" + "".join(
        f"| {key} | {samples.shown(value)} |\n" for key, value in table.items()
    )


def _settings(run: Run) -> dict[str, str]:
    model, relora, facts = run.config.model, run.config.relora, run.facts
    shape = f"{model.layers} layers of {model.hidden}, MLP {model.mlp}, {model.heads} heads"
    table = {"model": f"{shape}, {model.vocab_size:,} pieces"}
    if run.low_rank:
        start = run.low_rank_start
        table["warm start"] = f"the first {start:,} updates, full-rank" if start else "none"
        table["low-rank update"] = (
            f"r = {relora.rank}, alpha = {relora.alpha:g}, in {', '.join(relora.targets)}"
        )
    if run.config.arm == "relora":
        often = f", of {relora.merges_per_cycle} merges each" if relora.merges_per_cycle > 1 else ""
        table["restarts"] = f"every {relora.cycle_updates:,} updates{often}; prune = {relora.prune}"
    return table | {
        "parameters trained": number(facts.get("trained"), ","),
        "parameters frozen": number(facts.get("frozen"), ","),
        "a full-rank run trains": number(facts.get("full_rank_total"), ","),
        "reduction": number(facts.get("reduction_percent"), ".1f") + " %",
        "devices": _flat(facts.get("devices")),
        "versions": _flat(facts.get("versions")),
    }


def _outcome(run: Run) -> dict[str, str]:
    train = run.of("train")
    last = train[-1] if train else {}
    perplexities = [f"{told} (update {update:,})" for update, told in run.perplexities()] or ["-"]
    done, total = run.rows[-1]["update"], run.config.train.updates
    return {
        "updates done": f"{done:,} of {total:,}",
        "restarts done": number(last.get("restarts"), ","),
        "updates skipped": number(last.get("skipped"), ","),
        "tokens seen": number(last.get("tokens_seen"), ","),
        "tokens/s (median)": number(metrics_file.tokens_per_s(run.rows), ",.0f"),
        "time": duration(last["elapsed_s"]) if train else "-",
        "perplexity at first": perplexities[0],
        "perplexity at last": perplexities[-1],
        "perplexity of the unigram": number(run.facts.get("unigram_perplexity"), ",.1f"),
    }


def _curves(run: Run, folder: Path) -> list[str]:
    """The sections over updates; one whose rows are not there yet is left out."""
    relora = run.config.relora
    timeline = pictures.Timeline(
        min(run.low_rank_start, run.rows[-1]["update"]) if run.low_rank else 0,
        [row["update"] for row in run.of("restart") if row["reset"]],
    )
    train, evaluations = run.points("train", "loss"), run.points("eval", "loss")
    sections = []
    if train or evaluations:
        pictures.loss(folder / "loss.png", train, evaluations, timeline)
        text = "How badly the model predicts the next piece, in training batches and in held-out text."
        sections.append(_section("Loss", "loss", text + _marks(timeline)))
    if rates := run.points("train", "lr"):
        pictures.learning_rate(folder / "learning_rate.png", rates, timeline)
        text = "How large a step the optimizer takes, at the updates that were logged."
        if timeline.restarts and relora.jagged:
            back = f"{relora.restart_warm_up_updates:,} updates"
            text += (
                f" At a restart it falls to 0 and climbs back within {back}, while the fresh factors settle."
            )
        sections.append(_section("Learning rate", "learning_rate", text))
    if found := run.points("eval", "perplexity"):
        unigram = run.facts.get("unigram_perplexity")
        pictures.perplexity(folder / "perplexity.png", found, unigram, timeline)
        text = "exp(loss) on held-out text: among how many pieces the model wavers, as it were."
        text += " The dashed line is reached by knowing the frequency of each piece and nothing else."
        sections.append(_section("Perplexity", "perplexity", text))
    return sections


def _marks(timeline: pictures.Timeline) -> str:
    marks = []
    if timeline.warm_start_updates:
        marks.append("the grey part is the full-rank warm start")
    if timeline.restarts:
        marks.append("an orange line is a restart, across which the model computes the same function")
    return f" In each picture {', and '.join(marks)}." if marks else ""


def _summed_update(run: Run, folder: Path) -> str:
    """Spectrum, counts and ranks of the summed update, or one sentence that says why they are not there."""
    relora, start = run.config.relora, run.low_rank_start
    merges, rounding = 0, dict[str, float]()
    try:
        then, now, update = _checkpoints(run)
        scale, stored = (
            relora.alpha / relora.rank,
            {"base_dtype": relora.base_dtype, "base_init": relora.base_init},
        )
        found = spectrum.spectra(now, then, scale=scale, **stored)
        ranks = {kind: relora.rank if spectrum.is_low_rank(now, kind) else 0 for kind in found}
        merges = sum(row["merged"] and start < row["update"] < update for row in run.of("restart"))
        for kind, rank in ranks.items():
            writes = merges if rank else update - start
            rounding[kind] = spectrum.rounding(now[names.kernel_of(names.LAYERS[kind])], writes=writes)
    except Exception as error:  # Orbax raises plain Exceptions, and the report without this part tells much
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"## Summed update\n\nLeft out: {samples.shown(reason)}.\n"
    pictures.spectrum(folder / "spectrum.png", found, ranks=ranks, merges=merges, rounding=rounding)
    text = (
        f"What the updates from {start:,} to {update:,} added to the kernels, taken apart into directions: "
    )
    text += "a singular value says how far a kernel moved along one of them."
    if rank := max(ranks.values()):
        text += f" One low-rank update has no more than r = {rank} directions; with {merges} merged before "
        reach = f"{merges + 1} x {rank} = {rank * (merges + 1)}"
        text += f"it the sum may have {reach}, or as many as the kernel's smaller side."
    return _section("Summed update", "spectrum", text) + "\n" + _counts(found, ranks, rounding)


def _counts(found: dict[str, np.ndarray], ranks: dict[str, int], rounding: dict[str, float]) -> str:
    """The table of values below 0.1 and of numerical ranks, a row per kind of kernel."""
    head = "kernel | smaller side | values below 0.1 | numerical rank | against r"
    lines = [f"| {head} |", "|---|---:|---:|---:|---:|"]
    for kind, values in found.items():
        numerical = spectrum.rank(values, rounding[kind])
        low, mean, high = numerical.min(), numerical.mean(), numerical.max()
        spread = f"{low}" if low == high else f"{mean:.1f} ({low} to {high})"
        count = f"{spectrum.below(values):,} of {values.size:,}"
        against = f"{mean / ranks[kind]:.1f} r" if ranks[kind] else "trained in full"
        lines.append(f"| {kind} | {values.shape[1]} | {count} | {spread} | {against} |")
    note = (
        "Counts are summed over the layers; ranks are the layers' mean and range. A rank counts the values "
    )
    note += "that rounding of the stored kernels cannot explain"
    note += (
        f": those above {max(rounding.values()):.2g} or less, by kernel." if any(rounding.values()) else "."
    )
    if max(rounding.values()) > 0.1:
        note += " Here that rounding can lift values above 0.1: the counts are too low."
    return "\n".join(lines) + f"\n\n{note}\n"


def _checkpoints(run: Run) -> tuple[spectrum.Model, spectrum.Model, int]:
    """The model at the start of the low-rank phase, the newest one, and the newest one's update."""
    from relora_jax.checkpoint.saved import updates_saved  # here: Orbax takes seconds to import,
    from relora_jax.checkpoint.variables import variables_of  # and what is no run is refused without it

    start = run.low_rank_start
    saved = updates_saved(run.workdir)
    if start not in saved:
        raise UserError(f"no checkpoint of update {start:,}, which it is measured from, is kept")
    if saved[-1] == start:
        raise UserError(f"no checkpoint after update {start:,}, which it is measured from, is kept yet")
    return variables_of(run.workdir, start), variables_of(run.workdir, saved[-1]), saved[-1]


def _section(title: str, picture: str, text: str) -> str:
    return f"## {title}\n\n{text}\n\n![{title}](report/{picture}.png)\n"


def _config(run: Run) -> str:
    text = (run.workdir / CONFIG).read_text(encoding="utf-8").strip()
    return f"<details>\n<summary>Config</summary>\n\n```json\n{text}\n```\n\n</details>\n"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {one}" for key, one in value.items())
    return ", ".join(str(one) for one in value) if isinstance(value, list) else str(value or "-")
