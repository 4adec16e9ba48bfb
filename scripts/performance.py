"""python scripts/performance.py [--again]

Compiles the 1.3B model for one H100 with each policy of recomputing, form of the product and base type, and
at earlier commits with some of them; writes the end of docs/performance.md and its pictures. What is in
benchmarks/bench/ is taken from there unless --again is passed, so an interrupted run continues.
Needs the extra plan-cuda, and git for the earlier commits.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relora_jax import cli
from relora_jax.planning.chips import CHIPS
from relora_jax.planning.kernels import kernels, roofline_s
from relora_jax.reporting import pictures

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/performance.md", ROOT / "benchmarks/bench"
START = "<!-- written by scripts/performance.py -->\n"
RUN = ["--config=configs/1b.py", "--topology=h100:1", "--microbatch=8", "--json"]
RUN += ["--config.data.sequence_length=1024"]
POLICIES = ("full", "dots", "none")
# {base type: the forms of the product that are compiled with it}; full-rank stands beside the first
BASES = {
    "bfloat16": "separate,fused",
    "float32": "separate,fused",
    "float8_e4m3": "separate",
    "int8": "separate",
    "nf4": "separate,fused",
}
DRAWN = [("full", "bfloat16"), ("full", "float8_e4m3"), ("dots", "bfloat16"), ("dots", "float8_e4m3")]
# The commits at which a part of the work landed; today's code stands after them.
HISTORY = {
    "5fe6ad4": "before",
    "5eecd65": "flash attention, loss in chunks",
    "f984d83": "padded MLP, padded vocabulary",
    "aebe2f9": "fused delta, in bfloat16",
}
# What a program of an earlier commit is: its HLO and its memory, for today's `kernels` to read.
PROGRAM = """
import contextlib, sys
from relora_jax import cli
from relora_jax.planning import compiled
from relora_jax.planning.topology import make_topology
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh
update, file, *flags = sys.argv[1:]
config, _ = cli.parse(["", *flags])
mesh = make_mesh(**vars(config.mesh), devices=make_topology("h100:1").devices)
with getattr(compiled, "_target_has_cudnn", contextlib.nullcontext)():
    lowered = Program(config, mesh).lower(update)
program = lowered.compile()
open(file, "w").write(program.as_text())
m = program.memory_analysis()
used = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
print(used + m.temp_size_in_bytes + m.generated_code_size_in_bytes)
"""
FORMS = ("full", "separate", "fused")


def main(argv: Sequence[str]) -> int:
    """Compiles what is missing, then writes the page; returns the exit code."""
    again = cli.options(argv, again=False)["again"]
    results = {(policy, base): _result(policy, base, again=again) for policy in POLICIES for base in BASES}
    history = _history(again=again)
    _draw(results, history)
    before = PAGE.read_text().partition(START)[0]
    tables = [_aims(results), _table(results), _changes(results, history)]
    PAGE.write_text("\n\n".join([before + START.strip(), *tables]) + "\n")
    return 0


def _result(policy: str, base: str, *, again: bool) -> dict[str, Any]:
    """What bench says of a policy and a base type."""
    file = RESULTS / f"1b-h100-{base}-{policy}.json"
    if again or not file.exists():
        flags = [f"--config.model.remat={policy}", f"--config.relora.base_dtype={base}"]
        flags += [f"--product={BASES[base]}", *["--arms=relora"] * (base != "bfloat16")]
        print(f"compiling {file.name}", flush=True)
        command = [sys.executable, "-m", "relora_jax.bench", *RUN, *flags]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        file.write_text(output)
    return json.loads(file.read_text())


def _history(*, again: bool) -> dict[str, Any]:
    """{commit: {form: its step in seconds, and its bytes}} with model.remat=full and a bfloat16 base."""
    file = RESULTS / "1b-h100-history.json"
    history = json.loads(file.read_text()) if file.exists() and not again else {}
    for commit in HISTORY:
        for form in [form for form in FORMS if form not in history.get(commit, {})]:
            print(f"compiling {form} at {commit}", flush=True)
            history.setdefault(commit, {})[form] = _earlier(commit, form)
            file.write_text(json.dumps(history, indent=1) + "\n")
    return history


def _earlier(commit: str, form: str) -> dict[str, float]:
    """The roofline and the memory of an update as a commit has it."""
    low_rank = form != "full"
    arm = "relora" if low_rank else "full"
    flags = [f"--config=configs/1b.py:{arm}", "--config.data.sequence_length=1024"]
    flags += ["--config.train.batch=8", "--config.train.microbatch=8", "--config.model.remat=full"]
    if low_rank:
        flags += [f"--config.relora.product={form}", "--config.relora.base_dtype=bfloat16"]
    flags += ["--config.relora.dropout=0"] * (form == "fused")
    update = "low_rank_update" if low_rank else "full_rank_update"
    with tempfile.TemporaryDirectory() as folder:
        code, hlo = Path(folder) / "code", Path(folder) / "hlo"
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(code)], check=True)
        subprocess.run(["git", "-C", str(code), "checkout", "--quiet", commit], check=True)
        command = [sys.executable, "-c", PROGRAM, update, str(hlo), *flags]
        environment = os.environ | {"PYTHONPATH": str(code)}
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, cwd=code, env=environment
        )
        step_s = roofline_s(kernels(hlo.read_text()), CHIPS["h100"])
    return {"step_s": step_s, "bytes": float(done.stdout.split()[-1])}


def _draw(results: dict[tuple[str, str], dict[str, Any]], history: dict[str, Any]) -> None:
    steps, memory = {}, {}
    for policy, base in DRAWN:
        for column in results[policy, base]["columns"]:
            label = column["name"] + f", {base}" * (column["arm"] != "full")
            steps[f"{label}, remat {policy}"] = column["causes_s"]
            memory[f"{label}, remat {policy}"] = column["memory"]
    pictures.causes(ROOT / "docs/performance.png", steps, memory)
    today = {column["name"].split()[-1]: column for column in results["full", "bfloat16"]["columns"]}
    labels = [label.replace(", ", "\n") for label in (*HISTORY.values(), "today")]
    steps_ms = {form: [1e3 * history[commit][form]["step_s"] for commit in HISTORY] for form in FORMS}
    for form, values in steps_ms.items():
        values.append(1e3 * today[form]["step_median_s"])
    pictures.history(ROOT / "docs/performance_history.png", labels, steps_ms, label="ms per update, roofline")


def _table(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """All columns, each beside full-rank with the same policy."""
    lines = ["| `model.remat` | | base | step | to full | products | the rest | memory | to full |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|---:|"]
    for policy in POLICIES:
        full = results[policy, "bfloat16"]["columns"][0]
        for base in BASES:
            for column in results[policy, base]["columns"]:
                step_s, products_s = column["step_median_s"], column["causes_s"]["matrix products"]
                ratios = step_s / full["step_median_s"], column["compiled_bytes"] / full["compiled_bytes"]
                is_full = column["arm"] == "full"
                cells = [policy if is_full else "", column["name"], "" if is_full else base]
                cells += [f"{1e3 * step_s:.1f} ms", "" if is_full else f"{ratios[0]:.3f}"]
                cells += [f"{1e3 * products_s:.1f}", f"{1e3 * (step_s - products_s):.1f}"]
                cells += [f"{column['compiled_bytes'] / 1e9:.2f} GB", "" if is_full else f"{ratios[1]:.3f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _aims(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """What was aimed for, what is reached, and why not more."""

    def best(policy: str, base: str, value: str) -> str:
        full = results[policy, "bfloat16"]["columns"][0]
        columns = [column for column in results[policy, base]["columns"] if column["arm"] != "full"]
        column = min(columns, key=lambda column: column[value])
        return f"{column[value] / full[value]:.3f} ({column['name'].split()[-1]}, {base}, {policy})"

    def causes(policy: str, base: str) -> dict[str, float]:
        """Of the separate form, in ms; of full-rank without a base."""
        columns = results[policy, base or "bfloat16"]["columns"]
        column = columns[0] if not base else next(c for c in columns if c["name"].endswith("separate"))
        return {cause: 1e3 * seconds for cause, seconds in column["causes_s"].items()}

    def bytes_of(base: str) -> tuple[float, float]:
        """(weights, moments, gradients and the inputs of 24 layers; the rest) of the leanest form, in GB."""
        column = min(results["full", base]["columns"][-2:], key=lambda column: column["compiled_bytes"])
        kept = sum(column["memory"][part] for part in ("weights", "moments", "gradients"))
        kept += 24 * 8 * 1024 * 2048 * 2
        return kept / 1e9, (column["compiled_bytes"] - kept) / 1e9

    full, eight = causes("dots", ""), causes("dots", "float8_e4m3")
    wide, lean = bytes_of("bfloat16"), bytes_of("float8_e4m3")
    full_ms = 1e3 * min(results[policy, "bfloat16"]["columns"][0]["step_median_s"] for policy in POLICIES)
    rows = [
        (
            "full-rank, a step",
            "116 ms",
            f"{full_ms:.1f} ms (dots)",
            f"products take {full['matrix products']:.1f} ms, the optimizer {full['optimizer']:.1f}: it "
            "reads and writes 28 bytes of each parameter, and reads 4 for the norm",
        ),
        (
            "relora to full-rank, bfloat16 base, a step",
            "0.78",
            best("dots", "bfloat16", "step_median_s") + "; " + best("full", "bfloat16", "step_median_s"),
            "norms, rotations, SwiGLU and copies cost both arms the same",
        ),
        (
            "8-bit base, a step",
            "0.62",
            best("dots", "float8_e4m3", "step_median_s")
            + "; "
            + best("full", "float8_e4m3", "step_median_s"),
            f"rounding x and dy takes {eight['rounding']:.1f} ms, dropout {eight['dropout']:.1f}; products "
            "with factors stay in bfloat16 and are bound by memory",
        ),
        (
            "bfloat16 base, memory",
            "0.33",
            best("full", "bfloat16", "compiled_bytes"),
            f"{wide[0]:.2f} GB are weights, moments, gradients and what enters each layer, {wide[1]:.2f} GB "
            "the loss and a layer's backward pass",
        ),
        (
            "8-bit base, memory",
            "0.28",
            best("full", "float8_e4m3", "compiled_bytes") + "; " + best("full", "nf4", "compiled_bytes"),
            f"likewise {lean[0]:.2f} and {lean[1]:.2f} GB (float8)",
        ),
        (
            "memory with dots",
            "0.50",
            best("dots", "bfloat16", "compiled_bytes") + "; " + best("dots", "float8_e4m3", "compiled_bytes"),
            "what products give, which both arms keep",
        ),
    ]
    header = ["| | aim | reached | what is in the way |", "|---|---:|---|---|"]
    return "\n".join([*header, *(f"| {' | '.join(row)} |" for row in rows)])


def _changes(results: dict[tuple[str, str], dict[str, Any]], history: dict[str, Any]) -> str:
    lines = ["| after | commit | full-rank | separate | fused |", "|---|---|---:|---:|---:|"]
    today = {
        form: {"step_s": column["step_median_s"], "bytes": column["compiled_bytes"]}
        for form, column in zip(FORMS, results["full", "bfloat16"]["columns"], strict=True)
    }
    for commit, forms in [*history.items(), ("", today)]:
        cells = [
            f"{1e3 * forms[form]['step_s']:.0f} ms, {forms[form]['bytes'] / 1e9:.2f} GB" for form in FORMS
        ]
        lines.append(f"| {HISTORY.get(commit, 'today')} | {commit} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(main, __doc__)
