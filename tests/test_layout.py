"""The package is layered: imports only go down, and nothing imports the commands at the top."""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "relora_jax"
COMMANDS = {
    "train",
    "prepare",
    "evaluate",
    "generate",
    "export",
    "import_hf",
    "report",
    "bench",
    "plan",
    "study",
}
# Subpackages (rooms) and top-level modules from the bottom up; each imports only lower floors and itself.
FLOORS = [
    {"core", "errors"},
    {"storage", "config", "families"},
    {"tokenizer", "cli"},
    {"data", "model", "shapes"},
    {"training"},
    {"checkpoint", "validate"},
    {"run"},
    {"hf", "reporting", "planning"},
    {"loop", "benchmark"},
    {"studies"},
    COMMANDS,
]
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
SOURCES = ("relora_jax", "configs", "scripts", "tests")
VAGUE_NAMES = {"told", "found", "there", "said", "place"}


def imports(file: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(package, subpackage or module) of each import in `file` from this repository."""
    for node in ast.walk(ast.parse(file.read_text())):
        modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for package, _, module in (name.partition(".") for name in modules):
            if package in ("relora_jax", "tests"):
                yield from (
                    [(package, module.split(".")[0])]
                    if module
                    else [(package, alias.name) for alias in node.names]
                )


def test_imports_go_one_way() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.stem not in ("__init__", "__pycache__")}
    assert rooms == HEIGHT.keys()
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            wrong = {r for _, r in imports(file) if r != room and HEIGHT.get(r, 0) >= HEIGHT[room]}
            assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_tests_mirror_the_package_and_import_only_support() -> None:
    tests = ROOT / "tests"
    rooms = {path.name for path in tests.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms - {"support"} == {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    for file in tests.rglob("test_*.py"):
        used = {module for package, module in imports(file) if package == "tests"}
        assert used <= {"support", "mutants"}, f"{file.relative_to(ROOT)} imports {used}"


def test_core_can_be_imported_alone() -> None:
    others = [name for name in HEIGHT if name != "core"]
    code = f"import sys; sys.modules |= dict.fromkeys(['relora_jax.' + name for name in {others}])\n"
    modules = sorted((PACKAGE / "core").glob("[!_]*.py"))
    code += "".join(f"import relora_jax.core.{file.stem}\n" for file in modules)
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("command", "absent"),
    [
        ("prepare", "jax"),  # every worker process imports it
        ("prepare", "tensorflow_datasets"),
        ("report", "jax"),
        ("train", "tensorflow"),
        ("train", "tensorflow_datasets"),
        ("train", "grain"),
        ("train", "matplotlib"),
    ],
)
def test_command_does_not_import_what_it_does_not_need(command: str, absent: str) -> None:
    code = f"import relora_jax.{command}, sys; print('{absent}' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_nothing_needs_torch_or_transformers() -> None:
    # tensorboardX imports torch if it is installed
    code = "import sys; sys.modules |= {name: None for name in ('torch', 'transformers', 'peft')}\n"
    modules = (file.relative_to(ROOT).with_suffix("").parts for file in sorted(PACKAGE.rglob("[!_]*.py")))
    code += "".join(f"import {'.'.join(parts)}\n" for parts in modules)
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_no_name_is_vague() -> None:
    for file in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text()))
        names = {getattr(node, field, None) for node in nodes for field in ("id", "arg", "attr", "name")}
        assert not names & VAGUE_NAMES, f"{file.relative_to(ROOT)}: {names & VAGUE_NAMES}"
