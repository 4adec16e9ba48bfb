"""Validates a config before anything is allocated: one UserError that names the remedy.

The `data` settings are checked where they are first used, by `data.prepared.check`.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import jax

from relora_jax import shapes
from relora_jax.config import ARMS, LOW_RANK_ARMS, Config, check_types
from relora_jax.core import base, low_rank, reset, restart
from relora_jax.errors import UserError
from relora_jax.families import FAMILIES
from relora_jax.model import attention, llama, rope
from relora_jax.training import optimizers
from relora_jax.training.sharding import mesh_shape


def validate(config: Config, *, devices: int, platform: str = "") -> None:
    """UserError for the first setting that is invalid, by itself, with others, or on this many devices.

    These are of the platform that JAX uses, unless another is named.
    """
    check_settings(config)
    _devices(config, devices, platform or jax.default_backend())


def check_settings(config: Config) -> None:
    """UserError for the first setting that is invalid, by itself or with others, on any devices."""
    check_types(config)
    _one_of("arm", config.arm, ARMS)
    _model(config)
    _counts(config)
    _optimizer(config)
    _relora(config)
    if config.arm in LOW_RANK_ARMS:
        _phases(config)


def _model(config: Config) -> None:
    model = config.model
    _one_of("model.family", model.family, FAMILIES)
    for name in ("vocab_size", "hidden", "mlp", "layers", "heads", "kv_heads", "head_dim"):
        _positive(f"model.{name}", getattr(model, name))
    for name in ("rope_theta", "rms_eps", "init_std"):
        _rate(f"model.{name}", getattr(model, name))
    _one_of("model.remat", model.remat, llama.REMAT)
    _one_of("model.attention", model.attention, attention.ATTENTION)
    _dtype("model.compute_dtype", model.compute_dtype)
    with _prefixed("model.rope_scaling: "):
        rope.parse(model.rope_scaling)
    if model.sliding_window and not FAMILIES[model.family].has_window:
        raise UserError(
            f"model.sliding_window {model.sliding_window}: the family {model.family} has none: set it to 0"
        )
    for name in ("max_positions", "sliding_window"):
        _limits_rows(config, name)
    with _prefixed("model."):
        llama.check_heads(model.heads, model.kv_heads, model.head_dim)


def _limits_rows(config: Config, name: str) -> None:
    """UserError if rows are longer than a limit of the model; 0 is none."""
    limit, length = getattr(config.model, name), config.data.sequence_length
    _between(f"model.{name}", limit, 0, 2**31 - 1)
    if 0 < limit < length:
        raise UserError(f"data.sequence_length {length} exceeds model.{name} {limit}: shorten it")


def _cudnn(config: Config, platform: str) -> None:
    """UserError without a GPU, or for a dtype or shape that cuDNN's attention does not support on any GPU."""
    if refusal := attention.cudnn_refusal(config):
        raise UserError(f"model.attention cudnn {refusal}")
    if platform not in attention.GPU:
        raise UserError(f"model.attention cudnn needs a GPU, not {platform}: use xla")


def _optimizer(config: Config) -> None:
    optimizer, updates = config.optimizer, config.train.updates
    with _prefixed("optimizer."):
        optimizers.parse(optimizer.name)
    _rate("optimizer.kernel_lr_ratio", optimizer.kernel_lr_ratio)
    if config.arm in LOW_RANK_ARMS and optimizer.name != "adamw":
        raise UserError(
            f"optimizer.name {optimizer.name} is for full-rank training: use the arm full, or "
            "set optimizer.name=adamw"
        )
    _rate("optimizer.peak_lr", optimizer.peak_lr)
    _rate("optimizer.eps", optimizer.eps)
    for name, top in (("min_lr_ratio", 1.0), ("weight_decay", math.inf), ("clip_norm", math.inf)):
        _between(f"optimizer.{name}", getattr(optimizer, name), 0, top)
    for name in ("b1", "b2"):
        _between(f"optimizer.{name}", getattr(optimizer, name), 0, 1, below=True)
    why = f": the run has {updates} updates"
    _between("optimizer.warm_up_updates", optimizer.warm_up_updates, 0, updates, below=True, why=why)


def _devices(config: Config, devices: int, platform: str) -> None:
    train, mesh = config.train, config.mesh
    if config.model.attention == "cudnn":
        _cudnn(config, platform)
    if config.model.attention == "splash" and platform != "tpu":
        raise UserError(f"model.attention splash needs a TPU, not {platform}: use xla, or cudnn on a GPU")
    if config.model.attention == "splash" and config.model.compute_dtype == "float64":
        raise UserError("model.attention splash computes in at most float32, not in float64: use einsum")
    data, fsdp, _ = mesh_shape(data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor, devices=devices)
    if train.microbatch % (data * fsdp):
        raise UserError(
            f"train.microbatch {train.microbatch} must be a multiple of the {data * fsdp} devices that share "
            "it (mesh.data x mesh.fsdp)"
        )


def _counts(config: Config) -> None:
    train, mesh = config.train, config.mesh
    names = (
        "updates",
        "batch",
        "microbatch",
        "log_every_updates",
        "evaluate_every_updates",
        "save_every_updates",
    )
    for name in (*names, "eval_tokens", "keep_last"):
        _positive(f"train.{name}", getattr(train, name))
    for name in ("seed", "keep_every"):
        _between(f"train.{name}", getattr(train, name), 0, 2**31 - 1)
    for name in ("data", "fsdp", "tensor"):
        if name != "data" or mesh.data != -1:
            _positive(f"mesh.{name}", getattr(mesh, name))
    heads, kv_heads = config.model.heads, config.model.kv_heads
    if heads % mesh.tensor or kv_heads % mesh.tensor:
        raise UserError(
            f"mesh.tensor {mesh.tensor} splits whole heads, so it must divide model.heads {heads} and "
            f"model.kv_heads {kv_heads}: set it to a divisor of {math.gcd(heads, kv_heads)}"
        )
    if train.batch % train.microbatch:
        raise UserError(f"train.microbatch {train.microbatch} must divide train.batch {train.batch}")


def _relora(config: Config) -> None:
    relora = config.relora
    _rate("relora.peak_lr", relora.peak_lr)
    _rate("relora.factor_lr_ratio", relora.factor_lr_ratio)
    with _prefixed("relora."):
        base.parse(relora.base_dtype)
        restart.parse(relora.restart)
        reset.check(relora.prune, reset_count=relora.reset_count)
    for name in ("cycle_updates", "merges_per_cycle"):
        _positive(f"relora.{name}", getattr(relora, name))
    for name in ("warm_start_updates", "warm_up_updates", "restart_warm_up_updates"):
        _between(f"relora.{name}", getattr(relora, name), 0, 2**31 - 1)
    if not relora.targets:
        raise UserError("relora.targets is empty: name attention, mlp or single kernels such as q")
    targets = (*shapes.KERNELS, *(name for names in shapes.KERNELS.values() for name in names))
    for target in relora.targets:
        _one_of("relora.targets", target, targets)
    layer = {"rank": relora.rank, "alpha": relora.alpha, "dropout": relora.dropout}
    layer |= {"product": relora.product, "base_init": relora.base_init}
    for kernel, sides in shapes.target_kernels(config).items():
        with _prefixed("relora.", suffix=f" (the kernel {kernel})"):
            low_rank.check(sides, **layer)
    _one_of("relora.base_master", relora.base_master, ("none", "host"))
    if relora.base_master == "host" and relora.base_dtype in ("float32", "float64"):
        raise UserError(
            f"relora.base_master host only repeats a base_dtype of {relora.base_dtype}: set "
            "relora.base_master=none, or relora.base_dtype to bfloat16 or another below float32"
        )
    never_restarts = config.arm in ("lora", "lora_warm")
    if relora.restart == "merge_and_reinit_late" and (never_restarts or relora.base_init == "zero"):
        raise UserError(
            f"relora.restart {relora.restart} trains no factor before the first restart: use it with the arm "
            "relora and relora.base_init=keep"
        )
    if relora.base_init == "zero" and not shapes.trains_a(config):
        raise UserError(
            f"relora.base_init zero trains both factors, and relora.restart {relora.restart} only B: "
            "set relora.base_init=keep"
        )
    if relora.base_init == "zero" and relora.warm_start_updates:
        raise UserError("relora.base_init zero would discard the warm start: set relora.warm_start_updates=0")


def _phases(config: Config) -> None:
    """Checks that the low-rank phase has room for its warm-up, its cycles and the last re-warm-up."""
    relora, updates = config.relora, config.train.updates
    start = relora.warm_start_updates
    why = f": the run has {updates} updates"
    _between("relora.warm_start_updates", start, 0, updates, below=True, why=why)
    if config.arm == "lora" and start:
        raise UserError(
            f"relora.warm_start_updates {start}: the arm lora has no warm start: set it to 0 or use lora_warm"
        )
    if config.optimizer.warm_up_updates > start > 0:
        raise UserError(
            f"optimizer.warm_up_updates {config.optimizer.warm_up_updates} is longer than the warm start of "
            f"{start} updates (relora.warm_start_updates): shorten it"
        )
    phase = updates - start
    why = f": the low-rank phase has {phase} updates"
    _between("relora.warm_up_updates", relora.warm_up_updates, 0, phase, below=True, why=why)
    if config.arm != "relora":
        return
    cycle, rewarm = relora.cycle_updates, relora.restart_warm_up_updates
    if cycle >= phase:
        raise UserError(
            f"relora.cycle_updates {cycle} leaves no restart in the low-rank phase of {phase} updates: "
            "shorten it, or use the arm lora_warm"
        )
    if cycle % relora.merges_per_cycle:
        raise UserError(f"relora.merges_per_cycle {relora.merges_per_cycle} must divide the cycle of {cycle}")
    why = f": a cycle has {cycle} updates (relora.cycle_updates)"
    _between("relora.warm_up_updates", relora.warm_up_updates, 0, cycle, why=why)
    _between("relora.restart_warm_up_updates", rewarm, 0, cycle, why=why)
    last = phase - (phase - 1) // cycle * cycle
    if relora.jagged and last <= rewarm:
        raise UserError(
            f"train.updates {updates} ends inside a re-warm-up: the last cycle has {last} updates and "
            f"relora.restart_warm_up_updates is {rewarm}; run {rewarm - last + 1} more, or {last} fewer"
        )


@contextlib.contextmanager
def _prefixed(prefix: str, *, suffix: str = "") -> Iterator[None]:
    """A ValueError of `core`, which begins with an argument's name, as a UserError about the setting."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}{error}{suffix}") from None


def _one_of(name: str, value: Any, choices: Any) -> None:
    if value not in choices:
        raise UserError(f"{name} {value!r} is unknown: choose one of {', '.join(choices)}")


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise UserError(f"{name} {value} must be at least 1")
    if value >= 2**31:
        raise UserError(f"{name} {value} is too large: stay below {2**31}")


def _rate(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} {value} must be finite and above 0")


def _between(name: str, value: float, low: float, high: float, *, below: bool = False, why: str = "") -> None:
    if not (math.isfinite(value) and low <= value and (value < high if below else value <= high)):
        raise UserError(f"{name} {value} must lie in [{low}, {high}{')' if below else ']'}{why}")


def _dtype(name: str, value: str) -> None:
    wide = ("float64",) if jax.dtypes.canonicalize_dtype("float64") == "float64" else ()
    _one_of(name, value, ("float32", "bfloat16", *wide))
