"""Sends a run's rows to Weights & Biases: the same curves as TensorBoard, with updates as steps.

The package is the extra `wandb`, imported only if `train.wandb` names a project. WANDB_MODE=offline only
writes to the workdir; `wandb sync` sends it later.
"""

import json
import sys
import uuid
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from relora_jax.errors import UserError
from relora_jax.run.tensorboard_sink import curves
from relora_jax.storage import places
from relora_jax.storage.location import is_remote
from relora_jax.storage.writer import Writer

FINISH_S = 10.0  # less than the 25 s after a signal; unsent data stays in the workdir
FILE = "wandb.json"  # the project and the id of the W&B run


class WeightsAndBiases:
    """Sends each update once; if `resumed`, continues the same W&B run, else starts a new one.

    An evaluation that a signal postponed to the next start is in metrics.jsonl only. An error in W&B, now or
    later, is printed once, in one line, and stops the sending but not the training.
    """

    def __init__(self, writer: Writer, *, project: str, config: dict[str, Any], resumed: bool) -> None:
        self._run: Any = None
        self._try(lambda: self._start(writer, project, config, resumed))

    def write(self, row: dict[str, Any]) -> None:
        """Sends the row's curves at step `update`, unless W&B already has that update."""
        points = curves(row)
        if points and self._run is not None and row["update"] >= self._from:
            self._try(lambda: self._run.log(points, step=row["update"]))

    def flush(self) -> None:
        """Does nothing: W&B's own process sends, and buffers what it could not send yet."""

    def close(self) -> None:
        """Waits for unsent data, FINISH_S at most, and finishes the W&B run."""
        if self._run is not None:
            self._try(self._run.finish)
        self._run = None

    def _start(self, writer: Writer, project: str, config: dict[str, Any], resumed: bool) -> None:
        import wandb  # optional, and takes a second

        # console="off": capturing the output would break the progress line
        settings = wandb.Settings(console="off", quiet=True, finish_timeout=FINISH_S)
        run = wandb.init(
            project=project,
            id=_id(writer, project, resumed),
            name=writer.folder.name,
            dir=str(_folder(writer)),
            config=config,
            resume="allow",
            allow_val_change=True,  # a resumed run may have another mesh, say
            settings=settings,
        )
        # W&B refuses lower steps, which a run repeats if it was killed after its last checkpoint
        self._from, self._run = run.step, run

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # of any type: an external service must not end weeks of training
            self._run = None
            reason = " ".join(str(error).split()) or type(error).__name__
            message = f"warning: Weights & Biases failed; training continues without it: {reason}"
            print(message, file=sys.stderr, flush=True)


def check(project: str) -> None:
    """UserError if a project is named but the package is not installed."""
    try:
        _ = project and version("wandb")
    except PackageNotFoundError:
        raise UserError(
            f"train.wandb {project!r} needs wandb: pip install 'relora-jax[wandb]', or set it to ''"
        ) from None


def _folder(writer: Writer) -> Path:
    """Where W&B keeps its own files, which must be on a disk."""
    if not is_remote(writer.folder):
        return writer.folder
    folder = places.cache_dir() / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _id(writer: Writer, project: str, resumed: bool) -> str:
    """The id of the W&B run to continue; a new one is saved to the workdir."""
    file = writer.folder / FILE
    saved = json.loads(file.read_text(encoding="utf-8")) if resumed and file.is_file() else {}
    if saved.get("project") != project:
        saved = {"project": project, "id": uuid.uuid4().hex[:12]}
        writer.write(FILE, json.dumps(saved) + "\n")
    return saved["id"]
