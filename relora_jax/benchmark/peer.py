"""A column of PyTorch: what is sent to torch_peer.py, in a process of its own, and what it answers."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from relora_jax import shapes
from relora_jax.benchmark.column import Column
from relora_jax.benchmark.measured import LEARNING_RATE, synthetic_ids
from relora_jax.benchmark.torch_peer import MODULES
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.errors import UserError
from relora_jax.hf import llama
from relora_jax.planning import chips

BASE_DTYPES = ("float32", "bfloat16")
COMMAND = [sys.executable, "-W", "ignore", "-m", "relora_jax.benchmark.torch_peer"]


def check(config: Config) -> None:
    """UserError if PyTorch is not installed, or does not compute what the run does."""
    missing = [name for name in MODULES if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(
            f"--peer=torch needs {', '.join(missing)} (not installed): pip install 'relora-jax[bench]'"
        )
    if config.arm in LOW_RANK_ARMS and config.relora.base_dtype not in BASE_DTYPES:
        raise UserError(
            f"--peer=torch has no relora.base_dtype {config.relora.base_dtype}: set it to "
            f"{' or '.join(BASE_DTYPES)}, or omit --peer"
        )
    if config.optimizer.name != "adamw" or not shapes.trains_a(config):
        raise UserError(
            f"--peer=torch has AdamW and LoRA's two factors alone: set optimizer.name=adamw (not "
            f"{config.optimizer.name}) and relora.restart=merge_and_reinit (not {config.relora.restart})"
        )
    if not config.data.attend_across_documents:
        raise UserError("--peer=torch has no separate documents: pass --config.data.attend_across_documents")
    if len(jax.devices()) > 1:
        raise UserError(f"--peer=torch runs on one device, not {len(jax.devices())}: show JAX only one")


def share_gpu() -> None:
    """Leaves PyTorch its part of a GPU's memory; before JAX starts its devices."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class TorchPeer:
    """A runner (measured.py) of the same model, arm, rows and optimizer in PyTorch."""

    def __init__(self, name: str, config: Config) -> None:
        self.name, self.config = name, config
        self.facts: dict[str, Any] = {}
        self._answer: dict[str, Any] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Starts the process, which runs two updates."""
        with tempfile.TemporaryDirectory() as folder:
            ids = Path(folder) / "ids.npy"
            train, length = self.config.train, self.config.data.sequence_length
            vocab_size = self.config.model.vocab_size
            np.save(ids, synthetic_ids(vocab_size=vocab_size, rows=train.batch, length=length))
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(COMMAND, text=True, **pipes)
            self.facts = self._ask(json.dumps(settings(self.config) | {"ids": str(ids)}))

    def step(self) -> float:
        """Seconds of one update, as PyTorch's process measures them."""
        self._answer = self._ask("step")
        return self._answer["seconds"]

    def column(self, step_s: tuple[float, ...]) -> Column:
        """The column with these times; ends the process."""
        assert self._process is not None
        self._process.communicate()
        chip = chips.of_device(jax.devices()[0])
        peak = chip and chip.matmul_flops_per_s
        return Column(self.name, self.config, peak, step_s, peak_bytes=self._answer["peak_bytes"])

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            process.communicate()
            raise UserError(
                f"{self.name}: PyTorch ended with code {process.returncode} (see above): use fewer rows"
            )
        return json.loads(answer)


def settings(config: Config) -> dict[str, Any]:
    """What torch_peer.py needs to know of a config."""
    model, relora, optimizer = config.model, config.relora, config.optimizer
    length = config.data.sequence_length
    lora = {
        "r": relora.rank,
        "lora_alpha": relora.alpha,
        "lora_dropout": relora.dropout,
        "target_modules": [f"{name}_proj" for name in shapes.target_kernels(config)],
    }
    return {
        "model": llama.to_config(model, length=length, dtype="float32", special={}),
        "lora": lora if config.arm in LOW_RANK_ARMS else {},
        "base_dtype": relora.base_dtype,
        "compute_dtype": model.compute_dtype,
        "recompute": model.remat in ("dots", "full"),
        "clip_norm": optimizer.clip_norm,
        "optimizer": {
            "lr": LEARNING_RATE,
            "betas": [optimizer.b1, optimizer.b2],
            "eps": optimizer.eps,
            "weight_decay": optimizer.weight_decay,
        },
    }
