"""A toy run that tests can modify."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from relora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReloraConfig, TrainConfig
from relora_jax.core.prune import zero
from relora_jax.data.batches import Batch
from relora_jax.shapes import KERNELS
from relora_jax.training import steps
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh

LENGTH = 12
GROUP = {name: group for group, names in KERNELS.items() for name in names}
# {the oracle's name of a variable: its path in the model}
VARIABLE_PATHS = {"embed": "embed/embedding", "head": "head/kernel", "norm": "norm/scale"}
VARIABLE_PATHS |= {f"{name}_norm": f"blocks/{name}_norm/scale" for name in KERNELS}
VARIABLE_PATHS |= {name: f"blocks/{group}/{name}/kernel" for name, group in GROUP.items()}
VARIABLE_PATHS |= {f"{n}.{f}": f"blocks/{g}/{n}/lora_{f}" for n, g in GROUP.items() for f in "ab"}
VARIABLE_PATHS |= {f"{name}.bias": f"blocks/attention/{name}/bias" for name in "qkv"}
VARIABLE_PATHS |= {f"{name}_norm": f"blocks/attention/{name}_norm/scale" for name in "qk"}


def config(arm: str = "relora", **changes: Any) -> Config:
    """A run of 16 updates: warm start 4, cycles of 4. `group__field=value` changes a setting."""
    result = Config(
        name="small",
        arm=arm,
        model=ModelConfig(
            vocab_size=61,
            hidden=16,
            mlp=24,
            layers=2,
            heads=4,
            kv_heads=2,
            head_dim=4,
            compute_dtype="float32",
        ),
        relora=ReloraConfig(
            rank=3,
            alpha=6.0,
            product="separate",
            base_dtype="float32",
            warm_start_updates=0 if arm == "lora" else 4,
            cycle_updates=4,
            warm_up_updates=2,
            restart_warm_up_updates=2,
            peak_lr=1e-2,
            prune=zero(),
        ),
        optimizer=OptimizerConfig(peak_lr=5e-3, warm_up_updates=2),
        data=DataConfig(
            dataset="none",
            train_split="train",
            validation_split="validation",
            tokenizer="none",
            sequence_length=LENGTH,
        ),
        train=TrainConfig(
            updates=16,
            batch=8,
            microbatch=4,
            log_every_updates=1,
            evaluate_every_updates=8,
            save_every_updates=8,
            eval_tokens=100,
        ),
    )
    for key, value in changes.items():
        group, name = key.split("__")
        setattr(result, group, dataclasses.replace(getattr(result, group), **{name: value}))
    return result


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """The first data x fsdp x tensor devices."""
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def rows(config: Config, u: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids [A, M, L+1], lengths [A, M]) of update u: noisy walks, which a model can learn."""
    rng = np.random.default_rng([config.train.seed, u])
    shape = (config.accumulation, config.train.microbatch)
    hops = rng.integers(1, 4, (*shape, config.data.sequence_length + 1))
    ids = (rng.integers(0, config.model.vocab_size, (*shape, 1)) + hops.cumsum(-1)) % config.model.vocab_size
    lengths = rng.integers(config.data.sequence_length // 2, config.data.sequence_length + 2, shape)
    return ids.astype(np.int32), lengths.astype(np.int32)


def batch(config: Config, program: Program, u: int) -> Batch:
    """The rows of update u on the program's devices."""
    return Batch(*(jax.device_put(part, program.rows) for part in rows(config, u)))


def run(
    config: Config, program: Program, *, state: Any = None, start: int = 0, stop: int | None = None
) -> Any:
    """(state, losses) after the updates from start to stop, as in loop.py but without files."""
    state = program.init() if state is None else state
    losses = []
    for u in range(start, config.train.updates if stop is None else stop):
        state, _ = program.begin_update(u, state)
        state, values = program.train_step(state, batch(config, program, u), steps.learning_rate(config, u))
        losses.append(float(values["loss"]))
    return state, losses


def moved(state: Any, *, seed: int, deviation: float = 0.1) -> Any:
    """The state with noise added to everything trained, as after some updates: neither factor is zero."""
    rng = np.random.default_rng(seed)

    def shift(leaf: jax.Array) -> jax.Array:
        noise = rng.normal(0, deviation, leaf.shape).astype(np.float32)
        return jax.device_put(np.asarray(leaf) + noise, leaf.sharding)

    return dataclasses.replace(state, trained=jax.tree.map(shift, state.trained))
