"""What a run does before its first update and after each: evaluation, rows, checkpoint."""

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


class Harness:
    """A recorder with mocks that log its calls as events, and a signal in evaluation step `signal_at`."""

    def __init__(self, *, evaluated: int, signal_at: int | None) -> None:
        self.steps, self.events, self._signal_at = 0, list[str](), signal_at
        self.signals = Mock(spec=Signals, stop_requested=signal_at == 0)
        self.signals.should_stop.side_effect = lambda: self.signals.stop_requested
        program, checkpoints = Mock(spec=Program), Mock(spec=Checkpoints)
        metrics, openings = Mock(spec=Metrics, evaluated=evaluated), Mock(spec=EvalPrompts)
        program.eval_step.side_effect = lambda *_: self._step((np.float32(2.0), np.int32(1)))
        openings.continuations.side_effect = lambda *_: self._step([("a", "b")])
        metrics.pause.side_effect = lambda *_: contextlib.nullcontext()
        metrics.eval.side_effect = lambda u, **_: self.events.append(f"eval {u}")
        metrics.sample.side_effect = lambda u, **_: self.events.append(f"sample {u}")
        metrics.flush.side_effect = lambda u: self.events.append(f"flush {u}")
        checkpoints.due.side_effect = lambda u: u % 3 == 0 or u == 20
        checkpoints.save.side_effect = lambda u, _: self.events.append(f"save {u}")
        batches = [Mock(spec=Batch) for _ in range(BATCHES)]
        parts: Any = (program, metrics, checkpoints, batches, openings, self.signals)
        self.recorder = Recorder(small.config(**EVERY), *parts)

    def _step(self, result: Any) -> Any:
        self.steps += 1
        self.signals.stop_requested = self.signals.stop_requested or self.steps == self._signal_at
        return result


ROWS, SAVED = ["eval {}", "sample {}"], ["flush {}", "save {}"]


@pytest.mark.parametrize(
    ("u", "evaluated", "signal_at", "steps", "events"),
    [
        (0, -1, None, BATCHES + 1, [*ROWS, *SAVED]),  # a new run
        (4, -1, None, BATCHES + 1, ROWS),  # warm start from another run's checkpoint
        (5, 0, None, BATCHES + 1, ROWS),
        (5, 5, None, 0, []),  # resumed after the evaluation was logged
        (7, 5, None, 0, []),
        (9, 5, None, 0, SAVED),
        (20, 15, None, BATCHES + 1, [*ROWS, *SAVED]),  # the end
        (7, 5, 0, 0, SAVED),  # a signal during an update
        (10, 5, 0, 0, SAVED),  # when an evaluation is due
        (10, 5, 1, 1, SAVED),  # during the evaluation
        (10, 5, BATCHES, BATCHES, SAVED),
        (10, 5, BATCHES + 1, BATCHES + 1, SAVED),  # during the samples
        (10, 5, BATCHES + 2, BATCHES + 1, ROWS),  # later: handled in the next update
    ],
)
def test_signal_postpones_an_evaluation_and_due_work_is_done_once(
    u: int, evaluated: int, signal_at: int | None, steps: int, events: list[str]
) -> None:
    harness = Harness(evaluated=evaluated, signal_at=signal_at)
    assert harness.recorder.record(u, Mock(spec=TrainState, update=u)) == harness.signals.stop_requested
    assert harness.events == [line.format(u) for line in events]
    assert harness.steps == steps


def test_signals_are_handled_while_devices_start(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []

    def start() -> list[Any]:
        handlers.append(signal.getsignal(signal.SIGTERM))
        raise ValueError("no device")

    monkeypatch.setattr(loop, "start_devices", start)
    with pytest.raises(ValueError, match="no device"):
        train.main(["train", f"--config={ROOT / 'configs' / 'quickstart.py'}"])
    assert isinstance(getattr(handlers[0], "__self__", None), Signals)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize("flags", [[], ["--skip_bad_documents"]])
def test_bad_documents_are_skipped_only_with_the_flag(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Mock(return_value=0)
    monkeypatch.setattr(loop, "run", run)
    assert train.main(["train", f"--config={ROOT}/configs/60m.py", "--text=*.gz", *flags]) == 0
    _, _, options, _ = run.call_args.args
    assert options.skip_bad_documents == bool(flags)
    command = f"--config={ROOT}/configs/60m.py '--config.data.text=*.gz'"
    assert options.command == " ".join(["python -m relora_jax.prepare", command, *flags])
