"""Commands, in processes of their own on text of toy size, or called here."""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from relora_jax import cli, evaluate, import_hf
from relora_jax.checkpoint.saved import updates_saved
from relora_jax.checkpoint.variables import variables_of
from relora_jax.run import metrics_file
from tests.support.documents import texts, write_dataset

# The config file may end its own process: KILL_AT="u signal" sends the signal as update u begins; and it may
# take the targets away: EMPTY_FROM="u" gives batches without any from update u on. HANG_AT="u" computes for
# ever, in C with Python waiting, as update u begins. TERM_IN="u" sends SIGTERM in the evaluation after u
# updates, at each of its batches but the first, and says so.
CONFIG = """
import hashlib, os, signal
from relora_jax import magnitude
from relora_jax.data import batches as data
from relora_jax.training import program, steps
from tests.support import small

def get_config(arm="relora"):
    made = small.config(arm, relora__prune=magnitude(0.7), relora__dropout=0.1, train__updates=20)
    made.model.vocab_size = 380
    made.data.dataset, made.data.tokenizer = "toy", "bpe(380)"
    made.train.save_every_updates, made.train.evaluate_every_updates = 3, 5
    kill_at, _, number = os.environ.get("KILL_AT", "").partition(" ")
    due = steps.due

    def killing(config, u):
        if str(u) == kill_at:
            os.kill(os.getpid(), int(number))
        if str(u) == os.environ.get("HANG_AT"):
            print("hangs", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
        return due(config, u)

    steps.due = killing
    train_batch = data.train_batch

    def emptying(store, u, **shape):
        batch = train_batch(store, u, **shape)
        return batch._replace(lengths=batch.lengths * (u < int(os.environ.get("EMPTY_FROM", u + 1))))

    data.train_batch = emptying
    eval_step, batches = program.Program.eval_step, []

    def ending(self, state, batch):
        if str(int(state.update)) == os.environ.get("TERM_IN") and batches:
            print("asked in an evaluation", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        batches.append(batch)
        return eval_step(self, state, batch)

    program.Program.eval_step = ending
    return made
"""


class Place:
    """A folder with a config, a dataset of toy size, and caches of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        (folder / "toy.py").write_text(CONFIG)
        self.environment = {"TFDS_DATA_DIR": str(folder / "tfds"), "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as in conftest.py
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TFDS_DATA_DIR", self.environment["TFDS_DATA_DIR"])
            write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})

    def train(self, *words: str, workdir: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The finished process of one command."""
        return _finished(self.start(*words, workdir=workdir, **environment))

    def evaluate(self, *words: str, workdir: str) -> subprocess.CompletedProcess[str]:
        """The finished process of one `python -m relora_jax.evaluate`."""
        return _finished(self.start(*words, workdir=workdir, command="evaluate"))

    def start(
        self,
        *words: str,
        workdir: str,
        command: str = "train",
        limit_file_kib: int | None = None,
        **environment: str,
    ) -> subprocess.Popen[str]:
        """The running process of one command; with a limit it can write no file larger than that."""
        process = subprocess.Popen(
            [sys.executable, "-m", f"relora_jax.{command}", *words, f"--workdir={self.folder / workdir}"],
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if limit_file_kib is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_file_kib * 1024,) * 2)
        return process

    def rows(self, workdir: str) -> list[dict[str, Any]]:
        """metrics.jsonl without its times."""
        rows = metrics_file.read(self.folder / workdir)
        return [{k: v for k, v in row.items() if k not in ("tokens_per_s", "elapsed_s")} for row in rows]

    def weights(self, workdir: str) -> dict[str, np.ndarray]:
        """The model of the last checkpoint."""
        place = self.folder / workdir
        return dict(variables_of(place, updates_saved(place)[-1]))

    def facts(self, workdir: str) -> dict[str, Any]:
        """run.json."""
        return json.loads((self.folder / workdir / "run.json").read_text())


def _finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ended(capsys: Any, *words: str, code: int = 0, command: Any = evaluate) -> str:
    """The one line that the command prints: on stdout where it succeeds, else on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(command.main, command.__doc__, ["a command", *words])
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    [line] = (err if code else out).splitlines()
    return line


def import_command(source: pathlib.Path, place: pathlib.Path, *words: str) -> int:
    """The exit code."""
    argv = ["import_hf", f"--input={source}", f"--output={place}", *words]
    with pytest.raises(SystemExit) as stop:
        cli.main(import_hf.main, import_hf.__doc__, argv)
    return stop.value.code  # type: ignore[return-value]


@contextlib.contextmanager
def asked_for(platform: str) -> Iterator[None]:
    """As JAX_PLATFORMS has it, for what asks jax; its devices are there already."""
    jax.config.update("jax_platforms", platform)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", "cpu")


TOY = """
from tests.support import small

def get_config(arm="relora"):
    made = small.config(arm)
    made.model.vocab_size = 380
    made.train.batch, made.train.microbatch = 16, 8  # on the suite's 8 devices
    made.data.dataset, made.data.tokenizer = "toy", "bpe(380)"
    return made
"""
