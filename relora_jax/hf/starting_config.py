"""The config to pretrain an imported model with: its shapes and tokenizer, our choice of settings.

It reproduces nothing published and is not tuned. Rank and alpha are the paper's for 350m and 1b (rank 128,
scale 1/4; the rank is at most half of the smallest kernel dimension). Learning rates are low, because the
model is already trained, and twice the full-rank one for the factors; three restarts; 64 rows an update.
"""

import dataclasses
import shlex
from pathlib import Path
from typing import Any

from relora_jax import shapes
from relora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReloraConfig, TrainConfig
from relora_jax.core.prune import magnitude
from relora_jax.errors import UserError
from relora_jax.run import record

SEQUENCE_LENGTH = 1024  # or the model's max_positions or sliding_window if that is less
RANK = 128  # the paper's from 350m on
REMAT_PARAMETERS = 10**9  # larger models recompute activations in the backward pass

_TEXT = '''"""{name}, an imported model of {parameters:,} parameters, pretrained further.

    python -m relora_jax.prepare --config={config} --text='data/*.jsonl.gz'
    python -m relora_jax.train --config={config} --text='data/*.jsonl.gz'
    python -m relora_jax.export --workdir={workdir} --output=NEW

These prepare the rows of a text (once), train, and export the result to transformers. ARM in
--config=FILE:ARM is full, lora or relora (the default). Imported from {source}.
The settings come from relora_jax/hf/starting_config.py: override them with --config.GROUP.FIELD=VALUE, or
change the config that it returns.
"""

from relora_jax.hf.starting_config import starting_config


def get_config(arm: str = "relora"):
    return starting_config({run}, arm)
'''


def starting_config(run: str, arm: str) -> Config:
    """The config of one arm for the model that was imported to the directory `run`."""
    model, facts = record.read_config(Path(run)).model, record.read_facts(Path(run))
    rows = facts.get("rows", {}).get("train", {})
    ids = {f"{name}_id": rows[name] for name in ("eos", "pad", "bos") if name in rows}
    return of_model(model, run, arm, compute_dtype=facts.get("compute_dtype", "float32"), ids=ids)


def of_model(model: ModelConfig, run: str, arm: str, *, compute_dtype: str, ids: dict[str, Any]) -> Config:
    """The config of one arm; `ids`: the special ids of DataConfig, without unknown ones."""
    if arm == "control":
        raise UserError("an imported model has no control arm: choose full, lora or relora")
    half = min(min(sides) for sides in shapes.kernels(model).values()) // 2
    rank = min(RANK, 2 ** (max(half, 1).bit_length() - 1))
    limits = (SEQUENCE_LENGTH, model.max_positions, model.sliding_window)  # 0: none
    remat = "full" if shapes.parameters(model) > REMAT_PARAMETERS else "auto"
    return Config(
        name=Path(run).name,
        arm=arm,
        model=dataclasses.replace(model, compute_dtype=compute_dtype, remat=remat),
        relora=ReloraConfig(
            rank=rank,
            alpha=rank / 4,
            product="fused",
            base_dtype="float32",  # bfloat16 halves the base kernels' memory, but rounds at each merge
            warm_start_updates=0,  # the model is the warm start
            cycle_updates=1_000,
            warm_up_updates=100,
            restart_warm_up_updates=50,
            peak_lr=2e-4,
            prune=magnitude(0.9),
        ),
        optimizer=OptimizerConfig(peak_lr=1e-4, warm_up_updates=100 if arm == "full" else 0),
        data=DataConfig(  # --text sets `text`
            tokenizer=f"{run}/tokenizer",
            sequence_length=min(filter(None, limits)),
            **ids,
        ),
        train=TrainConfig(
            updates=4_000,
            batch=64,
            microbatch=8,
            log_every_updates=10,
            evaluate_every_updates=500,
            save_every_updates=500,
            eval_tokens=1_000_000,
            init_from=run,
        ),
    )


def text(model: ModelConfig, run: Path, *, source: str) -> str:
    """The config file of `run`, an absolute path."""
    return _TEXT.format(
        name=_in_docstring(run.name),
        parameters=shapes.parameters(model),
        config=_in_docstring(shlex.quote(str(run / "config.py"))),
        workdir=_in_docstring(shlex.quote(f"runs/{run.name}-relora")),
        source=_in_docstring(source),
        run=repr(str(run)),
    )


def _in_docstring(value: str) -> str:
    return repr(value)[1:-1].replace('"', '\\"')
