"""What a run does before its first update, and after one: the evaluation, its rows, the checkpoint."""

import contextlib
import pathlib
import signal
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from relora_jax import loop, train
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.data.batches import Batch
from relora_jax.loop import Recorder
from relora_jax.run.metrics import Metrics
from relora_jax.run.signals import Signals
from relora_jax.training.eval_prompts import EvalPrompts
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState
from tests.support import small

ROOT = pathlib.Path(__file__).parent.parent
BATCHES = 4
EVERY = {"train__evaluate_every_updates": 5, "train__updates": 20}


class Around:
    """What a recorder has around it: writes down what it is told, and gets a signal in step `asked_at`."""

    def __init__(self, *, evaluated: int, asked_at: int | None) -> None:
        self.steps, self.told, self._asked_at = 0, list[str](), asked_at
        self.signals = Mock(spec=Signals, asked=asked_at == 0)
        program, checkpoints = Mock(spec=Program), Mock(spec=Checkpoints)
        metrics, openings = Mock(spec=Metrics, evaluated=evaluated), Mock(spec=EvalPrompts)
        program.eval_step.side_effect = lambda *_: self._step((np.float32(2.0), np.int32(1)))
        openings.continued.side_effect = lambda *_: self._step([("a", "b")])
        metrics.pause.side_effect = lambda _: contextlib.nullcontext()
        metrics.eval.side_effect = lambda u, **_: self.told.append(f"eval {u}")
        metrics.sample.side_effect = lambda u, **_: self.told.append(f"sample {u}")
        metrics.flush.side_effect = lambda: self.told.append("flush")
        checkpoints.due.side_effect = lambda u: u % 3 == 0 or u == 20
        checkpoints.save.side_effect = lambda u, _: self.told.append(f"save {u}")
        batches = [Mock(spec=Batch) for _ in range(BATCHES)]
        parts: Any = (program, metrics, checkpoints, batches, openings, self.signals)
        self.recorder = Recorder(small.config(**EVERY), *parts)

    def _step(self, made: Any) -> Any:
        self.steps += 1
        self.signals.asked = self.signals.asked or self.steps == self._asked_at
        return made


ROWS, SAVED = ["eval {}", "sample {}"], ["flush", "save {}"]


@pytest.mark.parametrize(
    ("u", "evaluated", "asked_at", "steps", "told"),
    [
        (0, -1, None, BATCHES + 1, [*ROWS, *SAVED]),  # a run begins
        (4, -1, None, BATCHES + 1, ROWS),  # with another run's checkpoint
        (5, 0, None, BATCHES + 1, ROWS),
        (5, 5, None, 0, []),  # a run goes on from an evaluation that was made
        (7, 5, None, 0, []),
        (9, 5, None, 0, SAVED),
        (20, 15, None, BATCHES + 1, [*ROWS, *SAVED]),  # the end
        (7, 5, 0, 0, SAVED),  # a signal in an update
        (10, 5, 0, 0, SAVED),  # whose evaluation would be due
        (10, 5, 1, 1, SAVED),  # in the evaluation
        (10, 5, BATCHES, BATCHES, SAVED),
        (10, 5, BATCHES + 1, BATCHES + 1, SAVED),  # in the samples
        (10, 5, BATCHES + 2, BATCHES + 1, ROWS),  # later: in the next update
    ],
)
def test_a_signal_puts_an_evaluation_off_and_what_is_due_is_done_once(
    u: int, evaluated: int, asked_at: int | None, steps: int, told: list[str]
) -> None:
    around = Around(evaluated=evaluated, asked_at=asked_at)
    assert around.recorder.record(u, Mock(spec=TrainState, update=u)) == around.signals.asked
    assert around.told == [line.format(u) for line in told]
    assert around.steps == steps


def test_signals_are_heard_while_devices_start(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    def start() -> list[Any]:
        heard.append(signal.getsignal(signal.SIGTERM))
        raise ValueError("no device")

    monkeypatch.setattr(loop, "start_devices", start)
    with pytest.raises(ValueError, match="no device"):
        train.main(["train", f"--config={ROOT / 'configs' / 'quickstart.py'}"])
    assert isinstance(getattr(heard[0], "__self__", None), Signals)
