"""The table of plans: its verdicts and remedies, and the command that prints it."""

import json
import pathlib
from typing import Any

import pytest

from relora_jax import plan as command
from relora_jax.errors import UserError
from relora_jax.planning import arms, table
from relora_jax.planning.arms import ArmPlan
from relora_jax.planning.chips import CHIPS
from relora_jax.planning.compiled import Compiled, Memory
from relora_jax.planning.hlo import Collective, Costs
from relora_jax.planning.topology import Topology
from tests.support import small

ROOT = pathlib.Path(__file__).parents[2]
COSTS = Costs(2e9, 0.0, (Collective("all-gather", 3e9, 0), Collective("all-reduce", 1e9, 2e9)))
TOPOLOGY = Topology("2 x v5p:2x2x1", CHIPS["v5p"]._replace(memory_bytes=10e9), [None] * 8, 4)


def plan(arm: str, *, failing: tuple[str, ...] = (), refusal: str = "", recomputed: float = 0.0) -> ArmPlan:
    """A plan whose programs take 8 GB each, or 12 GB and nothing else known if they are `failing`."""
    programs = {}
    config = small.config(arm)
    for name in arms.program_names(config):
        costs = None if name in failing or refusal else Costs(2e9, recomputed, COSTS.collectives)
        total = 12e9 if name in failing else 8e9
        programs[name] = Compiled(Memory(1e9, 2e9, 1e9, total - 4e9), costs, refusal)
    return ArmPlan(config, TOPOLOGY, programs, None)


def cells(*plans: ArmPlan) -> dict[str, list[str]]:
    return {label: values for label, *values in table.rows(plans)}


def test_arms_stand_side_by_side() -> None:
    rows = cells(plan("full"), plan("relora"))
    assert rows[""] == ["full", "relora"]
    assert rows["parameters trained"] == ["5,872", "3,424"]
    assert rows["parameters frozen"] == ["0", "3,840"]
    assert rows["temporaries per device"] == ["4.00 GB"] * 2
    assert rows["full-rank update"] == ["fits: 8.00 GB, 2.00 GB left"] * 2
    assert rows["restart"] == ["-", "fits: 8.00 GB, 2.00 GB left"]
    assert rows["sent within a slice, per update"] == ["4.00 GB (all-gather 3.00 GB, all-reduce 1.00 GB)"] * 2
    assert rows["sent between slices, per update"] == ["2.00 GB (all-reduce 2.00 GB)"] * 2
    assert rows["time per update, at least"] == ["0.32 s (collectives between)"] * 2


def test_only_a_warm_start_that_does_not_fit_is_remedied_by_init_from() -> None:
    text = table.text([plan("relora", failing=("full_rank_update",))])
    assert "OUT OF MEMORY: 12.00 GB, 2.00 GB too much" in text
    assert text.splitlines()[-1].startswith("relora: only the warm start does not fit.")
    assert "--config.train.init_from=RUN" in text
    text = table.text([plan("relora", failing=("full_rank_update", "start_low_rank"))])
    assert text.splitlines()[-1].startswith("relora: the low-rank phase fits, its start does not.")
    for failing in (("full_rank_update", "start_low_rank"), ("low_rank_update",)):
        assert "init_from" not in table.text([plan("relora", failing=failing)])
    assert "init_from" not in table.text([plan("full", failing=("full_rank_update",))])
    assert "does not fit" not in table.text([plan("full"), plan("relora")])


def test_verdicts_other_than_memory() -> None:
    refused = cells(plan("full", refusal="INTERNAL: vmem"))
    assert refused["full-rank update"] == ["DOES NOT COMPILE: INTERNAL: vmem"]
    assert refused["time per update, at least"] == refused["matmul FLOPs per token"] == ["-"]
    again = cells(plan("full", recomputed=1e6))
    assert again["full-rank update"] == ["8.00 GB, only by computing 1.0e+06 FLOPs again"]


def test_markdown_is_a_table_of_the_same_cells() -> None:
    lines = table.markdown([plan("full"), plan("relora")]).splitlines()
    assert lines[:2] == ["|  | full | relora |", "|---|---:|---:|"]
    assert len(lines) == len(table.rows([plan("full")])) + 1


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """(arm, search) of each plan that the command asked for; nothing is compiled."""
    asked: list[Any] = []

    def fake(config: Any, topology: Any, compiler: Any, *, search: bool) -> ArmPlan:
        asked.append((config.arm, search))
        return plan(config.arm)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(command, "make_topology", lambda name, *, slices: TOPOLOGY)
    monkeypatch.setattr(arms, "plan", fake)
    return asked


def test_command_prints_json_and_draws_the_memory(
    planned: list[Any], tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--config=configs/7b.py:lora", "--topology=v5p:2x2x1", "--slices=2", "--json", "--search"]
    arguments += ["--arms=full,control,relora", f"--picture={tmp_path / 'memory.png'}"]
    assert command.main(["plan", *arguments]) == 0
    assert planned == [("full", True), ("control", True), ("relora", True)]
    facts = json.loads(capsys.readouterr().out)
    assert [(column["arm"], column["topology"]) for column in facts] == [
        (arm, "2 x v5p:2x2x1") for arm in ("full", "control", "relora")
    ]
    assert facts[2]["programs"]["low_rank_update"]["bytes"]["total"] == 8e9
    assert facts[2]["programs"]["restart"]["sent_between_bytes"] == {"all-reduce": 2e9}
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_text_by_default(planned: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["plan", "--config=configs/350m.py", "--topology=v5p:2x2x1"]) == 0
    assert planned == [("full", False), ("relora", False)]
    assert "time per update, at least" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology is missing: pass --topology=v5e:4x4"),
        (["--topology=v5p:2x2x1", "--slices=0"], "--slices=0 must be an integer of at least 1"),
        (["--topology=v5p:2x2x1", "--arms=full,none"], "unknown arm 'none'"),
        (["--topology=v5p:2x2x1", "--arms="], "--arms is empty"),
        (["--topology=v5p:2x2x1", "--config.mesh.fsdp=16"], "must equal the 8 devices"),
        (["--topology=v5p:2x2x1", "--config.train.microbatch=4"], "must be a multiple of the 8 devices"),
        (["--topology=v5p:2x2x1", "--picture=/nowhere/memory.png"], "--picture=/nowhere/memory.png"),
    ],
)
def test_mistake_is_reported_before_anything_is_compiled(
    planned: list[Any], arguments: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        command.main(["plan", "--config=configs/350m.py", *arguments])
    assert not planned
