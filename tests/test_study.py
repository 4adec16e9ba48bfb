"""`study`: what it prints and returns, and that it can be killed at any moment and started again."""

import json
import math
import pathlib
import signal
import subprocess
import time
from typing import Any

import pytest

from relora_jax import cli, study
from relora_jax.config import to_json
from relora_jax.errors import UserError
from relora_jax.run import record
from relora_jax.studies import grid, page, runner
from relora_jax.studies.grid import Arm, Run, Study
from tests.support import small
from tests.support.commands import Sandbox

CONFIG = """
from relora_jax.studies.grid import Arm, Study
from tests.support import small

def get_config(_=""):
    base = small.config("relora")
    base.model.vocab_size = 380
    base.data.dataset, base.data.tokenizer = "toy", "bpe(380)"
    base.train.batch = base.train.microbatch = 16
    arms = {
        "full": Arm(arm="full", rates=(1e-2, 2e-2, 4e-2)),
        "one_sided": Arm(arm="relora", rates=(1e-2, 2e-2, 4e-2), settings={"relora.restart": "one_sided"}),
    }
    base.optimizer.peak_lr = 1e-2
    return Study(name="toy", base=base, arms=arms, seeds=SEEDS, close=0.0)
"""


def config_file(folder: pathlib.Path, *, seeds: int = 2) -> str:
    file = folder / "study_toy.py"
    file.write_text(CONFIG.replace("SEEDS", str(seeds)))
    return f"--config={file}"


def exit_code(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(study.main, study.__doc__, ["study", *args])
    return stop.value.code  # type: ignore[return-value]


def valley(arm: str, rate: float) -> float:
    """A loss that is least at the rate 2e-2, and another for each arm."""
    return abs(math.log(rate / 2e-2)) + (1.0 if arm == "full" else 1.5)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs end at once with the loss of `loss(run)`; no report is drawn."""
    state: dict[str, Any] = {"loss": valley, "trained": []}

    def run_all(runs: Any, slots: Any, *, ended: Any, **_: Any) -> None:
        for workdir in runs:
            workdir.mkdir(parents=True)
            (workdir / record.CONFIG).write_text(to_json(runs[workdir]))
            arm, rate, seed = workdir.name.rsplit("-", 2)
            row = {"kind": "eval", "update": 16, "loss": state["loss"](arm, float(rate)) + int(seed)}
            (workdir / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")
            runner.record_outcome(workdir, "finished")
            state["trained"].append(workdir.name)
            assert ended(workdir, "finished").startswith("perplexity ")

    monkeypatch.setattr(runner, "run_all", run_all)
    monkeypatch.setattr(runner, "slots", lambda jobs: [])
    monkeypatch.setattr(page, "write", lambda *args, **options: pathlib.Path("report.md"))
    return state


def test_study_trains_each_run_once_and_ends_with_0(tmp_path: pathlib.Path, pretended: Any) -> None:
    args = (config_file(tmp_path), f"--workdir={tmp_path / 'study'}")
    assert exit_code(*args) == 0
    arms = ("full", "one_sided")
    expected = {f"{arm}-{rate}-0" for arm in arms for rate in ("0.01", "0.02", "0.04")}
    expected |= {f"{arm}-0.02-1" for arm in arms} | {"full-0.01-1"}  # the last: of the warm start
    assert set(pretended["trained"]) == expected and len(pretended["trained"]) == len(expected)
    assert exit_code(*args) == 0 and len(pretended["trained"]) == len(expected)  # nothing again


def test_best_rate_at_an_edge_ends_with_1_and_the_rate_to_add(
    tmp_path: pathlib.Path, pretended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended["loss"] = lambda arm, rate: abs(math.log(rate / (8e-2 if arm == "one_sided" else 2e-2)))
    args = (config_file(tmp_path), f"--workdir={tmp_path / 'study'}")
    assert exit_code(*args) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "error: arm one_sided: the best rate is at the edge of the grid: add 0.08 to its rates"
    assert exit_code(*args, "--extend") == 0
    assert "one_sided-0.16-0" in pretended["trained"] and "one_sided-0.08-1" in pretended["trained"]


def test_other_settings_in_the_same_directory_are_refused(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "full-0.1-0"
    workdir.mkdir()
    (workdir / record.CONFIG).write_text(to_json(small.config("full")))
    changed = small.config("full", train__updates=17)
    with pytest.raises(UserError, match=r"train\.updates: 16 -> 17\): use another --workdir"):
        runner.check(workdir, changed)
    runner.check(workdir, small.config("full"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms=best"], "the study has no arm best: choose from full, one_sided"),
        (["--jobs=-1"], "--jobs=-1 must be an integer of at least 0"),
        (["--config.base.train.batches=3"], "TrainConfig has no field 'batches'"),
        (["--config.base.relora.rank=0"], "relora.rank 0 does not fit"),
        (["--config=configs/quickstart.py"], "must return a relora_jax.studies.grid.Study"),
    ],
)
def test_mistake_is_one_line_before_anything_is_trained(
    tmp_path: pathlib.Path, pretended: Any, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    assert exit_code(config_file(tmp_path), f"--workdir={tmp_path / 'study'}", *args) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line and not pretended["trained"]


def test_results_of_other_settings_are_not_mixed_in(
    tmp_path: pathlib.Path, pretended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (config_file(tmp_path), f"--workdir={tmp_path / 'study'}")
    assert exit_code(*args, "--config.base.train.updates=24") == 0
    for more in ((), ("--report",)):
        assert exit_code(*args, *more) == 2
        assert "train.updates: 24 -> 16): use another --workdir" in capsys.readouterr().err


def test_report_trains_nothing(
    tmp_path: pathlib.Path, pretended: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (config_file(tmp_path, seeds=1), f"--workdir={tmp_path / 'study'}")
    assert exit_code(*args, "--report") == 2
    assert "no run of the study has ended" in capsys.readouterr().err and not pretended["trained"]
    assert exit_code(*args) == 0
    trained = list(pretended["trained"])
    assert exit_code(*args, "--report") == 0 and pretended["trained"] == trained


def test_choice_of_arms_includes_the_full_rank_arm_of_their_size() -> None:
    of = Study(
        name="s",
        base=small.config("relora"),
        arms={
            "full": Arm(arm="full", rates=(1e-3, 2e-3)),
            "low": Arm(arm="relora", rates=(1e-3, 2e-3)),
            "full@2": Arm(arm="full", rates=(1e-3, 2e-3), reference="full@2"),
            "low@2": Arm(arm="relora", rates=(1e-3, 2e-3), reference="full@2"),
        },
    )
    chosen = study._with_arms(of, ["low@2"])
    grid.check(chosen)
    assert list(chosen.arms) == ["full@2", "low@2"]


def test_cores_are_shared_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3, 4})
    assert [slot.cores for slot in runner.slots(2)] == [{0, 2, 4}, {1, 3}]
    assert [slot.cores for slot in runner.slots(0)] == [{0}, {1}, {2}, {3}, {4}]


def ended(process: "subprocess.Popen[str]") -> int:
    """The exit code of a process, whose output is read and closed."""
    process.communicate(timeout=900)
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_study_is_resumed_and_says_the_same(tmp_path: pathlib.Path, number: signal.Signals) -> None:
    sandbox, config = Sandbox(tmp_path), config_file(tmp_path)
    whole = sandbox.start(config, "--extend", workdir="whole", command="study")
    assert ended(whole) in (0, 1)
    killed = sandbox.start(config, "--extend", workdir="killed", command="study")
    while not list((tmp_path / "killed").glob("*.outcome.json")):
        assert killed.poll() is None
        time.sleep(0.2)
    killed.send_signal(number)
    assert ended(killed) == (75 if number == signal.SIGTERM else -9)
    again = sandbox.start(config, "--extend", workdir="killed", command="study")
    assert ended(again) == whole.returncode
    first, second = (json.loads((tmp_path / name / "toy.json").read_text()) for name in ("whole", "killed"))
    for name, arm in first["arms"].items():
        assert second["arms"][name]["losses"] == arm["losses"] and arm["losses"]
        assert second["arms"][name]["by_rate"] == arm["by_rate"]
    assert first["bytes"] == second["bytes"]
    assert Run("full", 1e-2, 0).name in {path.name for path in (tmp_path / "whole").iterdir()}
