"""Compares two runs beyond perplexity: where their weights lie, their spectra and their activations.

python -m relora_jax.report --compare --workdir A B [--output=pair.md]
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from tqdm import tqdm

from relora_jax.checkpoint.saved import DamagedError
from relora_jax.checkpoint.variables import variables_of
from relora_jax.config import Config
from relora_jax.data import batches
from relora_jax.data.batches import Batch
from relora_jax.errors import UserError
from relora_jax.reporting import html, landscape, pictures, spectrum
from relora_jax.reporting.landscape import Line
from relora_jax.reporting.samples import escape
from relora_jax.run import record, restored, warm_start
from relora_jax.run.format import strict_json
from relora_jax.storage import atomic
from relora_jax.storage.location import AnyPath
from relora_jax.training import ledger
from relora_jax.training.program import Program, enable_compilation_cache

TOKENS = 16_384  # held-out ones, for each loss
DIRECTIONS = 2
Spectra = Mapping[str, Mapping[str, np.ndarray]]  # {run: {kind: singular values [layers, side]}}
LOSS = """\
Left: the loss along the line between the two models. The barrier, by how much it exceeds the straight line
between the losses of the two, is {barrier:.3f} nats; the weights differ by {distance:.2f} times their norm.
Right: the loss along two random directions, the same draws for both, in which each column of a matrix has the
norm of that of the weights: the steeper, the sharper the minimum.
"""
WEIGHTS = """\
Singular values s of the kernels, factors merged: a thin line per layer, a bold one for their median. In the
table, the norm over all layers, and means over the layers of the effective rank, exp of the entropy of
s / sum(s), and of the stable rank, sum(s^2) / max(s)^2.
"""
UPDATES = "The same of what training added to the kernels since the start of the low-rank phase.\n"
NO_UPDATES = "Not available for {}: a checkpoint of the start or of the end of that phase is missing.\n"
ACTIVATIONS = """\
Linear CKA of the residual stream after each block, on {tokens:,} tokens of held-out text: 1 is equal up to
rotation and scale, and {chance:.2f} is about what unrelated activations have.
"""


def write(workdirs: Sequence[AnyPath], output: AnyPath) -> AnyPath:
    """Writes the Markdown page `output`, its pictures, and an .html and a .json beside it; returns `output`.

    UserError unless there are two runs, of models of one shape, that are evaluated on the same text.
    """
    if len(workdirs) != 2:
        raise UserError(f"--compare takes two runs, not {len(workdirs)}: name two after --workdir")
    if output.suffix != ".md":
        raise UserError(f"--output {str(output)!r} is a Markdown page: its name must end in .md")
    if output.resolve().parent in [workdir.resolve() for workdir in workdirs]:
        raise UserError(f"--output {str(output)!r} is among the files of a run: choose another directory")
    runs = dict(zip(_labels(workdirs), workdirs, strict=True))
    facts, spectra = _measured(runs, _check(workdirs))
    output.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(_parts(runs, facts, spectra, output))
    html.write(output.with_suffix(".html"), text)
    atomic.write(output.with_suffix(".json"), strict_json(facts).encode())
    atomic.write(output, text.encode())
    return output


def _measured(runs: Mapping[str, AnyPath], config: Config) -> tuple[dict[str, Any], Mapping[str, Spectra]]:
    """(what the JSON has, the spectra of "weights" and "updates" by run)."""
    at = {name: restored.update_of(run, None) for name, run in runs.items()}
    enable_compilation_cache()
    program = landscape.full_rank_program(config, restored.mesh_of(config))
    held_out = _held_out(next(iter(runs.values())), config, program)
    spectra: dict[str, dict[str, Any]] = {"weights": {}, "updates": {}}
    models = []
    for name, run in runs.items():
        try:
            variables = variables_of(run, at[name])
            models.append(landscape.merged(variables, program))
            spectra["weights"][name] = spectrum.weights(variables)
            with contextlib.suppress(UserError):
                of = record.read(run)
                spectra["updates"][name] = spectrum.of_run(of, *spectrum.checkpoints(of)[:2])
        except DamagedError as error:
            restored.check_not_deleted(run, at[name])
            raise UserError(f"{error}: the two cannot be compared without it") from error
    first, second = models
    between, around = _lines(program, dict(zip(runs, models, strict=True)), held_out)
    activations = [landscape.activations(program, model, held_out) for model in models]
    _, tokens, width = activations[0].shape
    losses = {float(t): loss for t, loss in between}
    facts = {
        "runs": {name: {"workdir": str(run), "update": at[name]} for name, run in runs.items()},
        "losses": dict(zip(runs, (losses[0.0], losses[1.0]), strict=True)),
        "barrier": landscape.barrier(between),
        "distance": landscape.distance(first, second),
        "between": between,
        "around": around,
        "cka": landscape.cka(activations[0], activations[1]).tolist(),
        "cka_by_chance": width / (tokens + width),
        "cka_tokens": tokens,
    }
    for of, values in spectra.items():
        facts[of] = {name: _ranks(kinds) for name, kinds in values.items()}
    return facts, spectra


def _parts(
    runs: Mapping[str, AnyPath], facts: Mapping[str, Any], spectra: Mapping[str, Spectra], output: AnyPath
) -> list[str]:
    """The page's parts, whose pictures are drawn beside `output`."""
    first, second = runs
    similarity = np.array(facts["cka"])

    def file(name: str) -> AnyPath:
        return output.with_name(f"{output.stem}_{name}.png")

    def image(name: str, title: str) -> str:
        return f"![{title}]({quote(file(name).name)})\n"

    pictures.loss_lines(file("loss"), facts["between"], facts["around"], ends=(first, second))
    pictures.spectra_of_two(file("weights"), spectra["weights"])
    pictures.cka(file("cka"), similarity, names=(first, second))
    updates = []
    if spectra["updates"]:
        pictures.spectra_of_two(file("updates"), {name: spectra["updates"].get(name, {}) for name in runs})
        updates += [UPDATES, image("updates", "Singular values of the updates")]
        updates += [_ranks_table(facts["updates"])]
    if missing := [escape(name) for name in runs if name not in spectra["updates"]]:
        updates.append(NO_UPDATES.format(" and ".join(missing)))
    return [
        f"# {escape(first)} and {escape(second)}\n",
        _table(runs, facts),
        "## Loss\n",
        LOSS.format(**facts),
        image("loss", "Loss between and around the two models"),
        "## Weights\n",
        WEIGHTS,
        image("weights", "Singular values of the weights"),
        _ranks_table(facts["weights"]),
        "## Updates\n",
        *updates,
        "## Activations\n",
        ACTIVATIONS.format(tokens=facts["cka_tokens"], chance=facts["cka_by_chance"]),
        _similarities(similarity),
        image("cka", "Similarity of activations"),
    ]


def _labels(workdirs: Sequence[AnyPath]) -> list[str]:
    """The names of the directories, or their paths if they are the same."""
    names = [workdir.name or workdir.absolute().name for workdir in workdirs]
    return names if len({*names}) == len(names) else [str(workdir) for workdir in workdirs]


def _check(workdirs: Sequence[AnyPath]) -> Config:
    """The first run's config. UserError if the models are different functions, or the text is another."""
    if workdirs[0].resolve() == workdirs[1].resolve():
        raise UserError(f"--compare takes two runs, and {workdirs[0]} is named twice: name another one")
    first, second = map(restored.config_of, workdirs)
    different = warm_start.differences(first, second)
    if first.data.attend_across_documents != second.data.attend_across_documents:
        different.append("data.attend_across_documents")
    rows = [record.read_facts(workdir).get("rows", {}).get("validation", {}) for workdir in workdirs]
    keys = sorted(rows[0].keys() | rows[1].keys())
    different += [f"held-out rows: {key}" for key in keys if rows[0].get(key) != rows[1].get(key)]
    if different:
        raise UserError(
            f"the runs cannot be compared ({'; '.join(different)}): choose two with one model and one text"
        )
    if not keys:
        raise UserError(f"{workdirs[0]} has no held-out rows: choose runs that were trained here")
    return first


def _held_out(workdir: AnyPath, config: Config, program: Program) -> list[Batch]:
    """The first rows of the validation split."""
    tokenizer = restored.tokenizer_of(workdir, config, "")
    store = restored.rows_of(workdir, config.data, tokenizer, "validation")
    devices = program.mesh.shape["data"] * program.mesh.shape["fsdp"]
    stream = batches.validation_batches(
        store,
        eval_tokens=TOKENS,
        microbatch=-(-config.train.microbatch // devices) * devices,
        sharding=program.eval_rows,
        across_documents=config.data.attend_across_documents,
    )
    return list(stream)


def _lines(
    program: Program, models: Mapping[str, Any], held_out: Sequence[Batch]
) -> tuple[Line, dict[str, list[Line]]]:
    """The losses between the two models, and along the directions of each, with a progress bar."""
    total = len(landscape.BETWEEN) + len(models) * DIRECTIONS * len(landscape.AROUND)
    with tqdm(total=total, unit=" losses", leave=False, disable=None) as bar:

        def taken(points: Iterable[tuple[float, float]]) -> Line:
            line = []
            for point in points:
                line.append(point)
                bar.update()
            return line

        first, second = models.values()
        between = taken(landscape.loss_between(program, first, second, held_out))
        keys = jax.random.split(jax.random.key(0), DIRECTIONS)
        around = {
            name: [taken(landscape.loss_around(program, model, key, held_out)) for key in keys]
            for name, model in models.items()
        }
    return between, around


def _table(runs: Mapping[str, AnyPath], facts: Mapping[str, Any]) -> str:
    lines = [f"| run | arm | update | loss on {TOKENS:,} held-out tokens |", "|---|---|---:|---:|"]
    for name, workdir in runs.items():
        update, loss = facts["runs"][name]["update"], facts["losses"][name]
        lines.append(f"| {escape(name)} | {record.read_config(workdir).arm} | {update:,} | {loss:.4f} |")
    return "\n".join(lines) + "\n"


def _ranks(spectra: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """{kind: norm over all layers, effective and stable rank as means over the layers}."""
    ranks = {}
    for kind, values in spectra.items():
        squares = np.square(values)
        largest = np.maximum(squares.max(axis=-1), np.finfo(float).tiny)
        ranks[kind] = {
            "norm": float(np.sqrt(squares.sum())),
            "effective_rank": ledger.effective_rank(values),
            "stable_rank": float(np.mean(squares.sum(axis=-1) / largest)),
        }
    return ranks


def _ranks_table(ranks: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    measures = {"norm": "norm", "effective_rank": "effective rank", "stable_rank": "stable rank"}
    head = [f"{label}, {escape(name)}" for label in measures.values() for name in ranks]
    lines = [f"| kernel | {' | '.join(head)} |", f"|---|{'---:|' * len(head)}"]
    for kind in next(iter(ranks.values())):
        cells = [f"{of[kind][key]:,.3g}" for key in measures for of in ranks.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _similarities(similarity: np.ndarray) -> str:
    layers = range(1, len(similarity) + 1)
    lines = [f"| layer | {' | '.join(map(str, layers))} |", f"|---|{'---:|' * len(similarity)}"]
    lines.append(f"| CKA | {' | '.join(f'{value:.3f}' for value in np.diag(similarity))} |")
    return "\n".join(lines) + "\n"
