"""python -m tests.mutants [WORD]: does a test notice when the code makes one of the known mistakes?

Each mutant is a small patch on a copy of the tree, beside the fastest test that should die of it. The tests
must pass on the copy without a patch first, and a mutant that cannot be imported does not count.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutant(NamedTuple):
    """A mistake: in `file` of the package, `old` (which occurs once) becomes `new`; `test` must fail."""

    mistake: str
    file: str
    old: str
    new: str
    test: str


STEPS, ORACLE = "tests/test_steps.py::", "tests/test_oracle.py::"
RESTART = STEPS + "test_restart_leaves_logits_unchanged_and_touches_only_what_it_should"
RUN = ORACLE + "test_run_in_float64_equals_oracle[magnitude]"

MUTANTS = [
    Mutant(
        "the last batch of an evaluation weighs like a full one",
        "evaluate.py",
        "loss = math.fsum(float(nats) for nats, _ in sums) / tokens",
        "loss = math.fsum(float(nats) / int(count) for nats, count in sums) / len(sums)",
        "tests/test_evaluate.py::test_evaluation_weighs_tokens_not_batches",
    ),
]


def main(word: str) -> int:
    """Prints a row for each mutant whose mistake contains `word`; how many survived."""
    chosen = [mutant for mutant in MUTANTS if word in mutant.mistake]
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("relora_jax", "tests", "configs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, copy / name)
        unmutated = _pytest(copy, *sorted({mutant.test for mutant in chosen}))
        if unmutated.returncode:
            print(unmutated.stdout[-4000:])
            print("the tests fail on the code as it is: no mutant was tried")
            return 1
        survived = sum(not _killed(mutant, copy) for mutant in chosen)
    print(f"{len(chosen)} mutants, {survived} survived")
    return survived


def _killed(mutant: Mutant, copy: pathlib.Path) -> bool:
    """Whether the test fails on the patched copy, which is mended afterwards."""
    path = copy / "relora_jax" / mutant.file
    code = path.read_text()
    if code.count(mutant.old) != 1:
        print(
            f"DOES NOT APPLY     {mutant.mistake}: {mutant.file} has the text {code.count(mutant.old)} times"
        )
        return False
    path.write_text(code.replace(mutant.old, mutant.new))
    try:
        imported = _python(copy, "-c", "import relora_jax.train; assert relora_jax.train.__file__[0] == '/'")
        if imported.returncode:
            print(f"DOES NOT IMPORT    {mutant.mistake}: {imported.stderr.strip().splitlines()[-1]}")
            return False
        failed = _pytest(copy, mutant.test).returncode == 1
    finally:
        path.write_text(code)
    name = mutant.test.rpartition("::")[2]
    print(
        f"KILLED by {name}: {mutant.mistake}" if failed else f"SURVIVED {name}: {mutant.mistake}", flush=True
    )
    return failed


def _pytest(copy: pathlib.Path, *tests: str) -> subprocess.CompletedProcess[str]:
    return _python(copy, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", *tests)


def _python(copy: pathlib.Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, where the copy's modules come first."""
    return subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ""))
