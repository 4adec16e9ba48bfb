"""A run's rows as a Weights & Biases run: the curves of TensorBoard, with updates as steps.

The package is the extra `wandb`, imported where `train.wandb` names a project. WANDB_MODE=offline writes
into the workdir alone; `wandb sync` sends it later.
"""

import json
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from relora_jax.errors import UserError
from relora_jax.run.tensorboard_sink import curves
from relora_jax.storage.writer import Writer

FINISH_S = 10.0  # what is not sent by then stays in the workdir: a signal leaves a process 25 s
FILE = "wandb.json"  # the project, and the run's id in it


class WeightsAndBiases:
    """One point per update: a resumed run goes on in the same W&B run, and sends no update twice.

    An evaluation that a signal put off to the next start is in metrics.jsonl alone.
    Where `resumed` is false, the W&B run is a new one. An error of W&B's, here or later, is told once,
    in one line, and ends the sending, not the training.
    """

    def __init__(self, writer: Writer, *, project: str, config: dict[str, Any], resumed: bool) -> None:
        self._run: Any = None
        self._try(lambda: self._start(writer, project, config, resumed))

    def write(self, row: dict[str, Any]) -> None:
        """The row's curves, at step `update`; an update that W&B has already is left out."""
        points = curves(row)
        if points and self._run is not None and row["update"] >= self._from:
            self._try(lambda: self._run.log(points, step=row["update"]))

    def flush(self) -> None:
        """Nothing: a process of W&B's own sends, and holds what could not be sent yet."""

    def close(self) -> None:
        """Waits for what is not sent yet, FINISH_S at most, and ends the run."""
        if self._run is not None:
            self._try(self._run.finish)
        self._run = None

    def _start(self, writer: Writer, project: str, config: dict[str, Any], resumed: bool) -> None:
        import wandb  # here, since it is an extra, and takes a second

        # off: what is printed is not sent, so that the live line stays one
        settings = wandb.Settings(console="off", quiet=True, finish_timeout=FINISH_S)
        run = wandb.init(
            project=project,
            id=_id(writer, project, resumed),
            name=writer.folder.name,
            dir=str(writer.folder),
            config=config,
            resume="allow",
            allow_val_change=True,  # a resumed run may have another mesh, say
            settings=settings,
        )
        # W&B refuses steps below, which a run that was killed after its last checkpoint comes to once more
        self._from, self._run = run.step, run

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:  # of any kind: a service of others must not end weeks of training
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            told = f"warning: Weights & Biases failed, and the run goes on without it: {reason}"
            print(told, file=sys.stderr, flush=True)


def check(project: str) -> None:
    """UserError where a project is named and the package is not there."""
    try:
        _ = project and version("wandb")
    except PackageNotFoundError:
        raise UserError(
            f"train.wandb {project!r} needs a package: pip install 'relora-jax[wandb]', or set it to ''"
        ) from None


def _id(writer: Writer, project: str, resumed: bool) -> str:
    """The id of the W&B run that the run goes on with, written down where it is a new one."""
    file = writer.folder / FILE
    kept = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    if kept.get("project") != project:
        kept = {"project": project, "id": uuid.uuid4().hex[:12]}
        writer.write(FILE, json.dumps(kept) + "\n")
    return kept["id"]
