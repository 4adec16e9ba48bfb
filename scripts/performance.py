"""python scripts/performance.py [--again]

Compiles the 1.3B model for one H100 with each policy of recomputing, form of the product and base type, and
at earlier commits with some of them; writes the end of docs/performance.md and its pictures. What is in
benchmarks/bench/ is taken from there unless --again is passed, so an interrupted run continues.
Needs the extra plan-cuda, and git for the earlier commits.
"""

import itertools
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
from relora_jax.planning.topology import make_topology
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
# (what, the key of its value in a column, the aim as a ratio, policies, base types)
AIMS = [
    ("step, bfloat16 base", "step_median_s", 0.78, ("full", "dots"), ("bfloat16",)),
    ("step, 8-bit base", "step_median_s", 0.62, ("full", "dots"), ("float8_e4m3", "int8")),
    ("memory with full recomputing, bfloat16 base", "compiled_bytes", 0.33, ("full",), ("bfloat16",)),
    ("memory with full recomputing, 8-bit base", "compiled_bytes", 0.28, ("full",), ("float8_e4m3", "int8")),
    ("memory with dots, bfloat16 base", "compiled_bytes", 0.50, ("dots",), ("bfloat16",)),
]
Results = dict[tuple[str, str], dict[str, Any]]  # of a policy and a base type
# {commit: the part of the work that landed there}
CHANGES = {
    "5fe6ad4": "before",
    "5eecd65": "flash attention, loss in chunks",
    "f984d83": "padded MLP, padded vocabulary",
    "aebe2f9": "fused delta, in bfloat16",
    "": "today",
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
    history, today = _history(again=again), results["full", "bfloat16"]["columns"]
    history[""] = {
        form: {"step_s": column["step_median_s"], "bytes": column["compiled_bytes"]}
        for form, column in zip(FORMS, today, strict=True)
    }
    columns = _drawn(results)
    _draw(columns, history)
    before = PAGE.read_text().partition(START)[0]
    tables = [_aims(results), _split(columns), _table(results), _changes(history)]
    PAGE.write_text("\n\n".join([before + START.strip(), *tables]) + "\n")
    return 0


def _result(policy: str, base: str, *, again: bool) -> dict[str, Any]:
    """What bench says of a policy and a base type."""
    file = RESULTS / f"1b-h100-{base}-{policy}.json"
    if again or not file.exists():
        flags = [f"--config.model.remat={policy}", f"--config.relora.base_dtype={base}"]
        flags += [f"--product={BASES[base]}", *["--arms=relora"] * (base != "bfloat16")]
        make_topology("h100:1")  # or says what is missing
        print(f"compiling {file.name}", flush=True)
        command = [sys.executable, "-m", "relora_jax.bench", *RUN, *flags]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        file.write_text(output)
    return json.loads(file.read_text())


def _history(*, again: bool) -> dict[str, Any]:
    """{commit: {form: its step in seconds, and its bytes}} with model.remat=full and a bfloat16 base."""
    file = RESULTS / "1b-h100-history.json"
    history = json.loads(file.read_text()) if file.exists() and not again else {}
    for commit in filter(None, CHANGES):
        for form in [form for form in FORMS if form not in history.get(commit, {})]:
            make_topology("h100:1")
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


def _drawn(results: Results) -> dict[str, dict[str, Any]]:
    """{what it is: a column} of those that are looked at by cause."""
    return {
        f"{column['name']}{f', {base}' * (column['arm'] != 'full')}, remat {policy}": column
        for policy, base in DRAWN
        for column in results[policy, base]["columns"]
    }


def _draw(columns: dict[str, dict[str, Any]], history: dict[str, Any]) -> None:
    pictures.causes(
        ROOT / "docs/performance.png",
        {name: column["causes_s"] for name, column in columns.items()},
        {name: column["memory"] for name, column in columns.items()},
    )
    labels = [CHANGES[commit].replace(", ", "\n") for commit in history]
    steps_ms = {form: [1e3 * forms[form]["step_s"] for forms in history.values()] for form in FORMS}
    pictures.history(ROOT / "docs/performance_history.png", labels, steps_ms, label="ms per update, roofline")


def _table(results: Results) -> str:
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


def _aims(results: Results) -> str:
    """What was aimed for, and the best that is reached."""
    lines = ["| relora to full-rank | aim | reached |", "|---|---:|---|"]
    for what, value, aim, policies, bases in AIMS:
        reached = []
        for policy, base in itertools.product(policies, bases):
            full = results[policy, "bfloat16"]["columns"][0]
            for column in results[policy, base]["columns"]:
                if column["arm"] != "full":
                    form = column["name"].removeprefix("relora ")
                    reached.append((column[value] / full[value], f"{form}, {base}, {policy}"))
        ratio, where = min(reached)
        lines.append(f"| {what} | {aim:.2f} | {ratio:.3f} ({where}) |")
    return "\n".join(lines)


def _split(columns: dict[str, dict[str, Any]]) -> str:
    """Each column's step by cause and its memory by purpose."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" + "|---:" * len(columns) + "|"]
    for key, unit, name in (("causes_s", 1e-3, "ms"), ("memory", 1e9, "GB")):
        for part in next(iter(columns.values()))[key]:
            cells = [f"{column[key][part] / unit:.2f}" for column in columns.values()]
            lines.append(f"| {part}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _changes(history: dict[str, Any]) -> str:
    """The step and the memory after each change."""
    lines = ["| after | commit | full-rank | separate | fused |", "|---|---|---:|---:|---:|"]
    for commit, forms in history.items():
        cells = [f"{1e3 * forms[f]['step_s']:.0f} ms, {forms[f]['bytes'] / 1e9:.2f} GB" for f in FORMS]
        lines.append(f"| {CHANGES[commit]} | {commit} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    cli.main(main, __doc__)
