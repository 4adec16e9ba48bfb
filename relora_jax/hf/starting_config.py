"""The text of a config to go on with the pretraining of an imported model: its shapes, a place to begin."""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from relora_jax import shapes
from relora_jax.config import ModelConfig

ROWS = 1024  # positions; fewer where the model's reach ends before
RANK = 128  # the paper's from 350m on
LARGE = 10**9  # parameters above which activations are computed again rather than kept

_TEXT = '''"""ReLoRA goes on with the pretraining of {name}, an imported model of {parameters:,} parameters.

    python -m relora_jax.prepare --config={config} --text='data/*.jsonl.gz'
    python -m relora_jax.train --config={config} --text='data/*.jsonl.gz'
    python -m relora_jax.export --workdir={workdir} --output=NEW

make rows of a text, once; train; write the result for transformers. ARM in --config=FILE:ARM is full, lora or
relora (the default).
Imported from {source}.
Reproduces nothing published and is not tuned. The model's own: shapes, rope, weights, tokenizer.
Ours: rank and alpha as the paper's 350m and 1b have them (rank 128, scale 1/4; a rank that its smallest
kernel can hold twice), low rates, since the model has been trained before, and twice the full-rank one for
the factors; three restarts; {tokens:,} tokens an update.
"""

from relora_jax import magnitude
from relora_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ReloraConfig,
    TrainConfig,
)

RUN = {run}  # the imported weights and tokenizer


def get_config(arm: str = "relora") -> Config:
    """The run of one arm."""
    if arm == "control":
        raise ValueError("an imported model has no smaller control: take the arm full, lora or relora")
    return Config(
        name={word},
        arm=arm,
        model=ModelConfig(
{model}        ),
        relora=ReloraConfig(
            rank={rank},
            alpha={alpha},
            product="folded",
            base_dtype="float32",  # bfloat16: half of the frozen part's memory, rounded at each merge
            warm_start_updates=0,  # the model is the warm start
            cycle_updates=1_000,
            warm_up_updates=100,
            restart_warm_up_updates=50,
            peak_lr=2e-4,
            prune=magnitude(0.9),
        ),
        optimizer=OptimizerConfig(
            peak_lr=1e-4,
            warm_up_updates=100 if arm == "full" else 0,
        ),
        data=DataConfig(  # `text` is given by --text
            tokenizer=RUN + "/tokenizer",
{ids}            sequence_length={length},
        ),
        train=TrainConfig(
            updates=4_000,
            batch={batch},
            microbatch=8,
            log_every_updates=10,
            evaluate_every_updates=500,
            save_every_updates=500,
            eval_tokens=1_000_000,
            init_from=RUN,
        ),
    )
'''


def text(
    model: ModelConfig, run: Path, *, source: str, compute_dtype: str, ids: dict[str, int], batch: int = 64
) -> str:
    """configs/-style Python for `run`, an absolute path; `ids`: those of DataConfig that are known."""
    parameters = shapes.parameters(model)
    remat = "full" if parameters > LARGE else "none"
    model = dataclasses.replace(model, compute_dtype=compute_dtype, remat=remat)
    length = min(ROWS, model.max_positions or ROWS)
    half = min(min(sides) for sides in shapes.kernels(model).values()) // 2
    rank = min(RANK, 2 ** (max(half, 1).bit_length() - 1))
    return _TEXT.format(
        name=_in_docstring(run.name),
        workdir=_in_docstring(shlex.quote(f"runs/{run.name}-relora")),
        parameters=parameters,
        config=_in_docstring(shlex.quote(str(run / "config.py"))),
        source=_in_docstring(source),
        tokens=batch * length,
        run=_literal(str(run)),
        word=_literal(run.name),
        model="".join(f"            {key}={_literal(value)},\n" for key, value in _stated(model)),
        rank=rank,
        alpha=rank / 4,
        ids="".join(f"            {key}={value},\n" for key, value in ids.items()),
        length=length,
        batch=batch,
    )


def _stated(model: ModelConfig) -> list[tuple[str, Any]]:
    """The settings that a config has to say: those without a default, and those of another value."""
    values = [(field, getattr(model, field.name)) for field in dataclasses.fields(model)]
    return [(field.name, value) for field, value in values if value != field.default]


def _literal(value: Any) -> str:
    """The value in Python, a text in double quotes."""
    text = repr(value)
    return f'"{text[1:-1]}"' if isinstance(value, str) and '"' not in text else text


def _in_docstring(text: str) -> str:
    return repr(text)[1:-1].replace('"', '\\"')
