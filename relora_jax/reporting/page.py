"""Writes a run's report: report.md with pictures, and the same page as one file, report.html."""

from typing import Any

import numpy as np

from relora_jax import shapes
from relora_jax.reporting import html, pictures, restarts, samples, spectrum
from relora_jax.run import goodput, metrics_file
from relora_jax.run.format import duration, number
from relora_jax.run.record import CONFIG, REPORT, Run, read
from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath
from relora_jax.training import names

ARMS = {
    "full": "the baseline: every kernel is trained in full",
    "control": "a smaller full-rank model with about as many parameters as the low-rank run trains",
    "lora": "one low-rank update for the whole run, never merged",
    "lora_warm": "a full-rank warm start, then one low-rank update that is never merged",
    "relora": "low-rank updates, merged into the frozen kernels at every restart",
}
FACTORS = """
Each target kernel W is frozen, beside a thin pair of factors, A [in, r] and B [r, out], of which {trained}
trained: the layer computes `x @ W + (alpha / r) * (x @ A) @ B`. Embeddings, norms and the head are trained in
full throughout. One such low-rank update changes W in at most r directions.
"""
RESTARTS = """\
ReLoRA therefore restarts regularly: it merges the product into W, reinitializes the factors and prunes their
optimizer state. A sum of many low-rank updates can have a high rank.
"""


def write(workdir: AnyPath) -> AnyPath:
    """Writes workdir/report.md, report.html and report/*.png for a run, finished or not; returns report.md.

    report.md is written last: if it exists, so do the others. UserError if `workdir` holds no run.
    """
    run = read(workdir)
    folder = run.workdir / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    parts = [_title(run), _facts(run), *_curves(run, folder), *restarts.section(run, folder)]
    parts += [_summed_update(run, folder), _config(run)]
    parts += samples.section(run)
    report = run.workdir / REPORT
    text = "\n".join(parts)
    html.write(report.with_suffix(".html"), text)
    atomic.write(report, text.encode())
    return report


def _title(run: Run) -> str:
    """Name, arm and result in a sentence, and the method of the low-rank arms in a few more."""
    text = f"`{run.config.arm}`: {ARMS[run.config.arm]}."
    unigram, evaluations = run.facts.get("unigram_perplexity"), run.of("eval")
    if evaluations:
        last, (update, perplexity) = evaluations[-1]["perplexity"], run.perplexities()[-1]
        text += f" Validation perplexity {perplexity} after {update:,} updates"
        text += f", {last / unigram:.2f} times that of the unigram distribution." if last and unigram else "."
    trained = "both are" if shapes.trains_a(run.config) else "B alone is"
    method = FACTORS.format(trained=trained) if run.low_rank else ""
    method += RESTARTS if run.config.arm == "relora" else ""
    return f"# {samples.escape(run.config.name)}, arm {run.config.arm}\n\n{text}\n{method}"


def _facts(run: Run) -> str:
    table = _settings(run) | _outcome(run)
    return "| | |\n|---|---|\n" + "".join(
        f"| {key} | {samples.escape(value)} |\n" for key, value in table.items()
    )


def _settings(run: Run) -> dict[str, str]:
    model, relora, facts = run.config.model, run.config.relora, run.facts
    shape = f"{model.layers} layers, hidden size {model.hidden}, MLP size {model.mlp}, {model.heads} heads"
    table = {"model": f"{shape}, vocabulary size {model.vocab_size:,}"}
    table["optimizer"] = run.config.optimizer.name
    if run.low_rank:
        start = run.low_rank_start
        table["warm start"] = f"the first {start:,} updates, full-rank" if start else "none"
        targets = ", ".join(relora.targets)
        table["low-rank update"] = f"r = {relora.rank}, alpha = {relora.alpha:g}, targets: {targets}"
    if run.config.arm == "relora":
        merges = f", {relora.merges_per_cycle} merges per cycle" if relora.merges_per_cycle > 1 else ""
        table["restart method"] = relora.restart
        table["restarts"] = f"every {relora.cycle_updates:,} updates of the low-rank phase{merges}"
        table["reset of the factors' moments"] = f"prune = {relora.prune}"
    reduction = facts.get("reduction_percent")
    return table | {
        "trained parameters": number(facts.get("trained"), ",") + _factors(run),
        "frozen parameters": number(facts.get("frozen"), ","),
        "parameters of the full-rank model": number(facts.get("full_rank_total"), ","),
        "reduction in trained parameters": "-" if reduction is None else f"{reduction:.1f}%",
        "devices": _flat(facts.get("devices")),
        "versions": _flat(facts.get("versions")),
    }


def _factors(run: Run) -> str:
    """How many of the trained parameters are factors, which the full-rank model does not have."""
    factors = shapes.trained_factors(run.config) if "trained" in run.facts else 0
    return f", of which {factors:,} are factors" if factors > 0 else ""


def _outcome(run: Run) -> dict[str, str]:
    train = run.of("train")
    last = train[-1] if train else {}
    perplexities = [f"{text} (update {update:,})" for update, text in run.perplexities()] or ["-"]
    update, total = run.rows[-1]["update"], run.config.train.updates
    return {
        "updates completed": f"{update:,} of {total:,}",
        "restarts completed": number(last.get("restarts"), ","),
        "skipped updates": number(last.get("skipped"), ","),
        "tokens seen": number(last.get("tokens_seen"), ","),
        "tokens/s (median)": number(metrics_file.median(run.rows, "tokens_per_s"), ",.0f"),
        "MFU (median)": number(metrics_file.median(run.rows, "mfu"), ".1%"),
        "peak memory of a device": _gigabytes(max((row.get("peak_bytes") or 0 for row in train), default=0)),
        "time": duration(last["elapsed_s"]) if train else "-",
        "goodput": str(goodput.read(run.workdir)),
        "first perplexity": perplexities[0],
        "last perplexity": perplexities[-1],
        "unigram perplexity": number(run.facts.get("unigram_perplexity"), ",.1f"),
    }


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count else "-"


def _curves(run: Run, folder: AnyPath) -> list[str]:
    """The sections with curves over updates, except those that have no rows yet."""
    relora = run.config.relora
    timeline = pictures.Timeline(
        min(run.low_rank_start, run.rows[-1]["update"]) if run.low_rank else 0,
        [row["update"] for row in run.of("restart") if row["reset"]],
    )
    train, evaluations = run.points("train", "loss"), run.points("eval", "loss")
    sections = []
    if train or evaluations:
        pictures.loss(folder / "loss.png", train, evaluations, timeline)
        text = "Next-token cross-entropy on training batches and on held-out text."
        sections.append(_section("Loss", "loss", text + _marks(timeline)))
    if updates := run.rows[-1]["update"]:
        from relora_jax.training import steps  # here: JAX is slow to import

        # from the config: a dip may fall between two logged updates
        rates = [steps.learning_rate(run.config, u) for u in range(updates)]
        pictures.learning_rate(folder / "learning_rate.png", rates, timeline)
        text = "The learning rate of each update."
        if timeline.restarts and relora.jagged:
            text += " At a restart it drops to 0 and warms up again over "
            text += f"{relora.restart_warm_up_updates:,} updates while the new factors settle"
            text += f", as at the start of the low-rank phase over {relora.warm_up_updates:,}."
        sections.append(_section("Learning rate", "learning_rate", text))
    if perplexities := run.points("eval", "perplexity"):
        unigram = run.facts.get("unigram_perplexity")
        pictures.perplexity(folder / "perplexity.png", perplexities, unigram, timeline)
        text = "exp(loss) on held-out text: as if the model chose among this many equally likely pieces. The "
        text += "dashed line is the unigram distribution, which knows only how frequent each piece is."
        sections.append(_section("Perplexity", "perplexity", text))
    return sections


def _marks(timeline: pictures.Timeline) -> str:
    marks = []
    if timeline.warm_start_updates:
        marks.append("the gray area is the full-rank warm start")
    if timeline.restarts:
        marks.append("an orange line is a restart, which does not change what the model computes")
    return f" In each picture, {', and '.join(marks)}." if marks else ""


def _summed_update(run: Run, folder: AnyPath) -> str:
    """Spectrum, counts and ranks of the summed update, or a sentence that says why they are not available."""
    relora, start = run.config.relora, run.low_rank_start
    merges, rounding = 0, dict[str, float]()
    try:
        now, then, update = spectrum.checkpoints(run)
        spectra = spectrum.of_run(run, now, then)
        ranks = {kind: relora.rank if spectrum.is_low_rank(now, kind) else 0 for kind in spectra}
        merges = sum(row["merged"] and start < row["update"] < update for row in run.of("restart"))
        for kind, rank in ranks.items():
            kernels = now[names.kernel_of(names.LAYERS[kind])]
            dtype, writes = (relora.base_dtype, merges) if rank else (kernels.dtype.name, update - start)
            if rank and relora.base_master == "host":
                writes = 2 if merges else 0  # the first and the last kernel are rounded, none between them
            rounding[kind] = spectrum.rounding(kernels, base_dtype=dtype, writes=writes)
    except Exception as error:  # Orbax raises plain Exceptions; the rest of the report needs none of this
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"## Summed update\n\nNot available: {samples.escape(reason)}.\n"
    pictures.spectrum(folder / "spectrum.png", spectra, ranks=ranks, merges=merges, rounding=rounding)
    text = (
        f"Singular values of the change in each kernel from update {start:,} to update {update:,}: each says "
        "how far the kernel moved along one direction."
    )
    if rank := max(ranks.values()):
        text += f" One low-rank update has rank at most r = {rank}"
        bound = f"{merges + 1} x {rank} = {rank * (merges + 1)}, or the kernel's smaller side if that is less"
        text += f"; with the {merges} merged before it, the sum has rank at most {bound}." if merges else "."
    return _section("Summed update", "spectrum", text) + "\n" + _counts(spectra, ranks, rounding)


def _counts(spectra: dict[str, np.ndarray], ranks: dict[str, int], rounding: dict[str, float]) -> str:
    """A table of the values below 0.1 and of the numerical ranks, with a row per kind of kernel."""
    head = "kernel | smaller side | values below 0.1 | numerical rank | relative to r"
    lines = [f"| {head} |", "|---|---:|---:|---:|---:|"]
    for kind, values in spectra.items():
        numerical = spectrum.rank(values, rounding[kind])
        low, mean, high = numerical.min(), numerical.mean(), numerical.max()
        spread = f"{low}" if low == high else f"{mean:.1f} ({low} to {high})"
        count = f"{spectrum.below(values):,} of {values.size:,}"
        relative = f"{mean / ranks[kind]:.1f} r" if ranks[kind] else "trained in full"
        lines.append(f"| {kind} | {values.shape[1]} | {count} | {spread} | {relative} |")
    note = (
        "Values below 0.1, the paper's threshold, are counted over all layers: the fewer, the "
        "more directions moved far. The numerical rank, the mean over the layers (and the range if they "
        "differ), counts every value above the rounding error of the kernel"
    )
    largest = max(rounding.values())
    note += f", at most {largest:.2g}." if largest else "."
    if largest > 0.1:
        note += " Here rounding alone can lift values above 0.1, so the counts below 0.1 are too low."
    return "\n".join(lines) + f"\n\n{note}\n"


def _section(title: str, picture: str, text: str) -> str:
    return f"## {title}\n\n{text}\n\n![{title}](report/{picture}.png)\n"


def _config(run: Run) -> str:
    text = (run.workdir / CONFIG).read_text(encoding="utf-8").strip()
    return f"<details>\n<summary>Config</summary>\n\n```json\n{text}\n```\n\n</details>\n"


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "-")
