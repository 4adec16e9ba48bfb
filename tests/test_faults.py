"""scripts/faults.py: its draws, allowed exit codes and table. The faults themselves are slow."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))
import fault_kinds  # noqa: E402
import faults  # noqa: E402
from faulty_run import INT, KILL, TERM, is_documented  # noqa: E402

ENDED = "perplexity 4,215.0 -> 1,251.0, report runs/x/report.md\n"


def test_each_block_of_faults_has_every_kind_once() -> None:
    kinds, n = list(fault_kinds.KINDS), len(fault_kinds.KINDS)
    blocks = [[fault_kinds.draw(0, k)[0] for k in range(b * n + 1, (b + 1) * n + 1)] for b in range(3)]
    assert all(sorted(block) == sorted(kinds) for block in blocks)
    assert len({tuple(block) for block in blocks}) == 3


def test_fault_is_drawn_from_seed_and_number_alone() -> None:
    def first_draw(seed: int, number: int) -> tuple[str, float]:
        kind, rng = fault_kinds.draw(seed, number)
        return kind, rng.random()

    assert first_draw(0, 7) == first_draw(0, 7)
    assert len({first_draw(seed, number) for seed in range(2) for number in range(1, 41)}) == 80


@pytest.mark.parametrize(
    ("number", "code", "out", "allowed"),
    [
        (KILL, -9, "update 3\n", True),
        (KILL, 75, "update 3\n", False),
        (KILL, 0, ENDED, True),
        (KILL, 0, "update 3\n", False),
        (TERM, 75, "update 3\n", True),
        (INT, 75, "", True),
        (TERM, 0, ENDED, True),
        (TERM, 0, "update 3\n", False),
        (TERM, -15, "update 3\n", False),
        (TERM, -15, "", True),
        (TERM, -15, ENDED, True),
        (INT, -2, "", True),
        (INT, -15, "", False),
        (INT, 1, "update 3\n", False),
        (INT, 1, "", True),
        (TERM, 1, "", False),
        (TERM, 74, "update 3\n", False),
    ],
)
@pytest.mark.parametrize("near_end", [True, False])
def test_only_documented_exit_codes_are_allowed(
    number: signal.Signals, code: int, out: str, allowed: bool, near_end: bool
) -> None:
    """A process that ran to its end although it should have stopped ignored the signal."""
    ignored = out == ENDED and code != -KILL and not near_end
    assert is_documented(number, code, out, near_end=near_end) is (allowed and not ignored)


def test_interrupt_swallowed_by_an_import_is_allowed_if_python_reports_it() -> None:
    err = "Exception ignored in: <function x>\nKeyboardInterrupt: \n"
    assert is_documented(INT, 0, ENDED, err, near_end=False)
    assert not is_documented(TERM, 0, ENDED, err, near_end=False)
    assert not is_documented(INT, 0, ENDED, "", near_end=False)


def test_results_are_read_by_number_and_skip_a_torn_line(tmp_path: pathlib.Path) -> None:
    rows = [{"number": number, "equal": True} for number in (3, 1, 9)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"number": 2, "eq'
    (tmp_path / "seed_0.jsonl").write_text(text)
    assert list(faults.read(tmp_path / "seed_0.jsonl", 3)) == [1, 3]
    assert faults.read(tmp_path / "seed_1.jsonl", 3) == {}


def test_table_has_a_row_per_fault_and_counts_equal_runs() -> None:
    row = {"number": 1, "kind": "disk full", "moment": "checkpoint 10", "codes": "74 0", "stderr": "a | b"}
    row |= {"resumed_after": "10", "equal": True, "seconds": 30.0, "commit": "abc"}
    text = faults.table("python x", [row, {**row, "number": 2, "equal": False}])
    assert "`python x`: **1/2 ended bitwise equal**, 1 minutes" in text
    assert "| 1 | disk full | checkpoint 10 | 74 0 | a \\| b | 10 | yes |\n" in text
    assert "| 2 | disk full | checkpoint 10 | 74 0 | a \\| b | 10 | **no** |\n" in text


@pytest.mark.slow
def test_faults_end_equal_and_the_command_resumes(tmp_path: pathlib.Path) -> None:
    def run(n: int) -> subprocess.CompletedProcess[str]:
        args = [f"--n={n}", "--seed=3", f"--directory={tmp_path}", f"--table={tmp_path / 't.md'}"]
        command = [sys.executable, str(SCRIPTS / "faults.py"), *args]
        return subprocess.run(command, capture_output=True, text=True)

    first = run(1)
    assert first.returncode == 0 and first.stdout.endswith("\n1/1 ended bitwise equal\n"), first
    second = run(3)
    assert second.returncode == 0 and second.stdout.endswith("\n3/3 ended bitwise equal\n"), second
    assert second.stdout.splitlines()[0] == first.stdout.splitlines()[0]
    assert (tmp_path / "t.md").read_text().count("\n| ") == 4
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["tfds", "whole", "whole_nan", "xla"]
