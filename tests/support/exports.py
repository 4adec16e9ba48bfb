"""Toy runs with checkpoints in both phases, and their exports."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from relora_jax import export
from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.config import Config
from relora_jax.data import batches
from relora_jax.data.prepared import Prepared
from relora_jax.hf.tensor_files import TensorFiles
from relora_jax.model.llama import Llama
from relora_jax.run import directory
from relora_jax.storage.writer import Writer
from relora_jax.training.evaluation import Evaluation, evaluate
from relora_jax.training.program import Program
from relora_jax.training.state import flatten, model_of
from tests.support import commands, small

CONFIG = small.config(
    model__vocab_size=380,
    model__rope_scaling="llama3(8.0, 1.0, 4.0, 16.0)",
    relora__targets=("attention", "down"),
    data__dataset="toy",
    data__tokenizer="bpe(380)",
    train__keep_last=20,
)


UPDATES = (4, 6)  # full-rank; in mid-cycle, with live factors


@dataclasses.dataclass
class SavedRun:
    """A run with checkpoints at UPDATES, its evaluations there, and its last model with live factors."""

    workdir: pathlib.Path
    prepared: Prepared
    model: Llama
    at: dict[int, Evaluation]


def save_run(
    workdir: pathlib.Path, config: Config, prepared: Prepared, updates: Sequence[int] = UPDATES
) -> SavedRun:
    """Writes a run to `workdir` with a checkpoint of moved weights at each of `updates`."""
    program = Program(config, small.mesh())
    state, at = program.init(), {}
    rows = {"eval_tokens": 100, "microbatch": 4, "sharding": program.eval_rows, "across_documents": True}
    with directory.locked(Writer(workdir), config), Checkpoints(workdir, config) as checkpoints:
        directory.begin(Writer(workdir), config, unigram_perplexity=1.0, rows=directory.keys_of(prepared))
        for u in updates:
            if u == 6:
                state = program.start_low_rank(state)
            state = small.moved(state, seed=u)
            at[u] = evaluate(program, state, batches.validation_batches(prepared.validation, **rows))
            checkpoints._write(u, flatten(model_of(state)))
            checkpoints.wait()
    phase = program.low_phase if 6 in updates else program.phase
    return SavedRun(workdir, prepared, phase.model(state.trained, state.frozen), at)


def output_line(capsys: Any, *args: str, code: int = 0) -> str:
    return commands.output_line(capsys, *args, code=code, command=export)


def export_run(capsys: Any, run: SavedRun, folder: pathlib.Path, *args: str) -> pathlib.Path:
    """Exports the run to `folder`, which the command prints and this returns."""
    line = output_line(capsys, f"--workdir={run.workdir}", f"--output={folder}", *args)
    assert line.startswith("update ") and line.endswith(f": {folder}")
    return folder


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    files = TensorFiles.open(folder)
    return {name: files.read(name) for name in files.kinds}


def copy_model(model: Llama) -> Llama:
    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, state))


def assert_same(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype, name
        assert arrays[name].tobytes() == np.ascontiguousarray(array).tobytes(), name
