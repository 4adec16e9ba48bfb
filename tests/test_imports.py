"""Imports go down only, TensorFlow is never imported, and the ground floor knows no Config."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "relora_jax"
# From the ground up; a module imports from lower floors, or from its own.
FLOORS = [
    {
        *("prune", "places", "schedule", "paths", "product", "merge", "progress", "lines", "spectrum"),
        *("checksum", "signals", "packing", "blocks", "rows", "json_lines", "disk"),
        *("hugging_face", "sentencepiece_model"),
        *("rope", "tensor_files", "sampling", "json_file", "charsmap"),
    },
    {"config", "low_rank", "moments", "tokenizer", "sotu", "tensorboard", "weights_and_biases", "files"},
    {"optimizer", "shapes", "text", "model", "data", "metrics", "pictures", "flags", "shards"},
    {"sentencepiece_json", "probes", "fast_tokenizer"},
    {"workers", "sharding", "steps", "validate", "llama_hf", "starting_config"},
    {"program", "run", "saved", "stores", "c4"},
    {"checkpoint", "comparison", "prepare", "samples", "weights"},
    {"report", "workdir", "warm_start", "throughput", "restored", "openings"},
    {"evaluate", "generate", "import_hf", "export"},
    {"train"},
]
# These take numbers, arrays and modules.
GROUND = {"schedule", "paths", "product", "merge", "low_rank", "moments", "optimizer", "prune", "sampling"}


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "relora_jax":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("relora_jax."):
            found.add(str(node.module).split(".")[1])
    return found


def test_imports_go_down_only() -> None:
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert modules.keys() == floor.keys()
    for name, path in modules.items():
        above = {other for other in imports(path) if floor[other] > floor[name]}
        assert not above, f"{name} imports {above}"


def test_the_core_knows_neither_config_nor_model() -> None:
    for name in GROUND:
        assert imports(PACKAGE / f"{name}.py") <= GROUND, name


def test_what_reads_text_needs_no_jax() -> None:
    names = ("jax", "tensorflow_datasets")
    code = f"import relora_jax.prepare, sys; print([m for m in {names} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"  # worker processes import it each


def test_nothing_imports_tensorflow() -> None:
    code = "import relora_jax.train, sys; print('tensorflow' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_nothing_needs_torch_or_transformers() -> None:
    # tensorboardX imports torch by itself, where it is there
    code = "import sys; sys.modules |= {name: None for name in ('torch', 'transformers', 'peft')}\n"
    code += "".join(f"import relora_jax.{path.stem}\n" for path in sorted(PACKAGE.glob("*.py")))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
