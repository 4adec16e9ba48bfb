"""Runs commands on toy text, in subprocesses or in this process."""

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

# Environment variables make the config file inject faults: KILL_AT="u signal" sends its own process the
# signal as update u begins; EMPTY_FROM="u" gives batches without targets from update u on; HANG_AT="u"
# computes forever in C, blocking Python, as update u begins; TERM_IN="u" prints a line and sends SIGTERM at
# each batch but the first of the evaluation after u updates; REPORT_S="s" makes the report s seconds slower;
# STALL_S="s" reports a stall after s seconds.
CONFIG = """
import hashlib, os, signal, time
from relora_jax import magnitude
from relora_jax.data import batches as data
from relora_jax.reporting import page
from relora_jax.run import stall
from relora_jax.training import program, steps
from tests.support import small

def get_config(arm="relora"):
    config = small.config(arm, relora__prune=magnitude(0.7), relora__dropout=0.1, train__updates=20)
    config.model.vocab_size = 380
    config.data.dataset, config.data.tokenizer = "toy", "bpe(380)"
    config.train.save_every_updates, config.train.evaluate_every_updates = 3, 5
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
    write = page.write

    def slow(workdir):
        time.sleep(float(os.environ.get("REPORT_S", "0")))
        return write(workdir)

    page.write = slow
    stall.LEAST_S = float(os.environ.get("STALL_S", stall.LEAST_S))
    train_batch = data.train_batch

    def emptying(store, u, **shape):
        batch = train_batch(store, u, **shape)
        return batch._replace(lengths=batch.lengths * (u < int(os.environ.get("EMPTY_FROM", u + 1))))

    data.train_batch = emptying
    eval_step, batches = program.Program.eval_step, []

    def ending(self, state, batch):
        if str(int(state.update)) == os.environ.get("TERM_IN") and batches:
            print("signal in an evaluation", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        batches.append(batch)
        return eval_step(self, state, batch)

    program.Program.eval_step = ending
    return config
"""


class Sandbox:
    """A folder with a config, a toy dataset and separate caches of text, to run commands in."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        (folder / "toy.py").write_text(CONFIG)
        self.environment = {"TFDS_DATA_DIR": str(folder / "tfds"), "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # these two as in conftest.py
        self.environment["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TFDS_DATA_DIR", self.environment["TFDS_DATA_DIR"])
            write_dataset("toy:1.0.0", {"train": texts(60), "validation": texts(20, seed=1)})

    def train(self, *args: str, workdir: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """The finished process of `python -m relora_jax.train`."""
        return _finished(self.start(*args, workdir=workdir, **environment))

    def evaluate(self, *args: str, workdir: str) -> subprocess.CompletedProcess[str]:
        """The finished process of `python -m relora_jax.evaluate`."""
        return _finished(self.start(*args, workdir=workdir, command="evaluate"))

    def start(
        self,
        *args: str,
        workdir: str,
        command: str = "train",
        limit_file_kib: int | None = None,
        **environment: str,
    ) -> subprocess.Popen[str]:
        """The running process of a command, which can write files of at most `limit_file_kib` KiB."""
        path = workdir if "://" in workdir else self.folder / workdir
        process = subprocess.Popen(
            [sys.executable, "-m", f"relora_jax.{command}", *args, f"--workdir={path}"],
            env={**os.environ, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if limit_file_kib is not None:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit_file_kib * 1024,) * 2)
        return process

    def rows(self, workdir: str) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl without their times."""
        rows = metrics_file.read(self.folder / workdir)
        return [{k: v for k, v in row.items() if k not in metrics_file.TIMES} for row in rows]

    def weights(self, workdir: str) -> dict[str, np.ndarray]:
        """The model variables of the last checkpoint."""
        path = self.folder / workdir
        return dict(variables_of(path, updates_saved(path)[-1]))

    def facts(self, workdir: str) -> dict[str, Any]:
        """run.json."""
        return json.loads((self.folder / workdir / "run.json").read_text())


def _finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=300)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def output_line(capsys: Any, *args: str, code: int = 0, command: Any = evaluate) -> str:
    """The single line that the command prints, on stdout if `code` is 0, else on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(command.main, command.__doc__, ["a command", *args])
    out, err = capsys.readouterr()
    assert stop.value.code == code, err
    [line] = (err if code else out).splitlines()
    return line


def import_command(source: pathlib.Path, workdir: pathlib.Path, *args: str) -> int:
    """Runs the command; returns its exit code."""
    argv = ["import_hf", f"--input={source}", f"--output={workdir}", *args]
    with pytest.raises(SystemExit) as stop:
        cli.main(import_hf.main, import_hf.__doc__, argv)
    return stop.value.code  # type: ignore[return-value]


@contextlib.contextmanager
def jax_platforms(platform: str) -> Iterator[None]:
    """Sets jax_platforms, as JAX_PLATFORMS does; devices that are already initialized stay."""
    jax.config.update("jax_platforms", platform)
    try:
        yield
    finally:
        jax.config.update("jax_platforms", "cpu")


TOY = """
from tests.support import small

def get_config(arm="relora"):
    config = small.config(arm)
    config.model.vocab_size = 380
    config.train.batch, config.train.microbatch = 16, 8  # on the suite's 8 devices
    config.data.dataset, config.data.tokenizer = "toy", "bpe(380)"
    return config
"""
