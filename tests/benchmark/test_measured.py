"""What is measured: the order of updates, a device's peak, and the programs of a run on real rows."""

import jax
import numpy as np
import pytest

from relora_jax.benchmark import measured
from relora_jax.benchmark.column import Column
from relora_jax.benchmark.measured import Ours
from relora_jax.training.program import Program
from tests.support import small


class Recorded:
    """A runner without programs: `log` receives what is asked of all."""

    def __init__(self, name: str, log: list[str], *, compiled_bytes: float = 0.0, holds: float = 0.0) -> None:
        self.name, self.config, self.log = name, small.config(), log
        self.compiled_bytes, self.holds, self.peak_bytes = compiled_bytes, holds, None

    def start(self) -> None:
        self.log.append(f"start {self.name}")
        STATS["peak_bytes_in_use"] = max(STATS["peak_bytes_in_use"], self.holds)

    def stop(self) -> None:
        self.log.append(f"stop {self.name}")

    def step(self) -> float:
        self.log.append(self.name)
        return float(len(self.log))

    def column(self, step_s: tuple[float, ...]) -> Column:
        return Column(self.name, self.config, None, step_s)


STATS = {"peak_bytes_in_use": 0.0}


def test_updates_alternate() -> None:
    log: list[str] = []
    columns = measured.alternate([Recorded("a", log), Recorded("b", log)], rounds=3)
    assert log == ["start a", "start b", *"ababab"]
    assert [column.step_s for column in columns] == [(3, 5, 7), (4, 6, 8)]


def test_peak_of_a_device_is_asked_after_each_runner_alone_smallest_first(monkeypatch) -> None:
    log: list[str] = []
    STATS["peak_bytes_in_use"] = 1.0
    monkeypatch.setattr(measured, "_peak_bytes", lambda: STATS["peak_bytes_in_use"])
    runners = [
        Recorded("large", log, compiled_bytes=30, holds=31.0),
        Recorded("small", log, compiled_bytes=10, holds=12.0),
        Recorded("hidden", log, compiled_bytes=20, holds=11.0),
    ]
    measured.measure_peaks(runners)
    assert log == [f"{act} {name}" for name in ("small", "hidden", "large") for act in ("start", "stop")]
    assert [runner.peak_bytes for runner in runners] == [31, 12, None]
    monkeypatch.setattr(measured, "_peak_bytes", lambda: None)  # as on a CPU
    measured.measure_peaks(runners)
    assert len(log) == 6


@pytest.mark.parametrize("arm", ["full", pytest.param("relora", marks=pytest.mark.slow)])
def test_column_of_an_arm_has_its_own_phase_and_restarts(arm: str) -> None:
    config = small.config(arm, train__batch=8, train__microbatch=8, relora__warm_start_updates=0)
    runner = Ours(arm, config)
    [column] = measured.alternate([runner], rounds=3)
    state = runner._state
    assert bool(jax.tree.leaves(state.frozen)) == (arm == "relora")
    assert int(state.update) == 2 + 3 and int(state.skipped) == 0
    assert len(column.step_s) == 3 and min(column.step_s) > 0
    assert (column.restart_s is not None) == (arm == "relora")
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(jax.tree.map(lambda x: x[...], state)))
    assert column.compiled_bytes is not None and column.compiled_bytes > arrays / 8
    assert column.mfu is None and column.peak_bytes is None


def test_documents_of_a_batch_are_apart_where_the_run_has_them_apart() -> None:
    config = small.config(data__attend_across_documents=False, train__batch=8, train__microbatch=8)
    batch = measured.synthetic_batch(config, Program(config, small.mesh(data=8)))
    assert batch.ids.shape == (1, 8, small.LENGTH + 1) and int(batch.lengths.min()) == small.LENGTH + 1
    assert batch.segment_ids is not None and set(np.unique(batch.segment_ids)) == {0, 1}
