"""The paper's LLaMA sizes and runs: model shapes, the control of each size, the settings all runs share.

Source: the published configurations of ReLoRA (arXiv 2307.05695); vocabulary 32,100 (T5's pieces).
"""

import dataclasses
from typing import Any

from relora_jax.config import (
    LOW_RANK_ARMS,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ReloraConfig,
    TrainConfig,
)
from relora_jax.core import restart
from relora_jax.core.prune import Prune
from relora_jax.errors import UserError
from relora_jax.families import FAMILIES

#             hidden   mlp  layers heads
SHAPES = {
    "9m": (128, 352, 4, 4),
    "20m": (256, 688, 4, 4),
    "35m": (384, 1024, 6, 8),
    "40m": (416, 1024, 8, 8),
    "60m": (512, 1376, 8, 8),
    "71m": (512, 1368, 12, 8),
    "100m": (640, 1708, 12, 10),
    "130m": (768, 2048, 12, 12),
    "250m": (768, 2560, 24, 16),
    "350m": (1024, 2736, 24, 16),
    "590m": (1280, 3424, 26, 20),
    "1b": (2048, 5461, 24, 32),
    "3b": (2560, 6848, 32, 32),
    "7b": (4096, 11008, 32, 32),
}
# The paper's "control" (7b's is ours): the full-rank model with about as many parameters as the low-rank run
# of a size trains. quickstart and 2m have small vocabularies, and controls of their own in configs/
CONTROL = {"60m": "40m", "130m": "71m", "250m": "100m", "350m": "130m", "1b": "250m", "7b": "590m"}
KERNELS = {"attention": ("q", "k", "v", "o"), "mlp": ("gate", "up", "down")}


def llama(name: str, **settings: Any) -> ModelConfig:
    """The model of a size, with multi-head attention; `settings` override any field of ModelConfig."""
    hidden, mlp, layers, heads = SHAPES[name]
    shape = {"hidden": hidden, "mlp": mlp, "layers": layers, "heads": heads, "kv_heads": heads}
    return ModelConfig(**{"vocab_size": 32100, "head_dim": hidden // heads, **shape, **settings})


def control(name: str) -> str:
    """The size of the control of size `name`; UserError if the paper has none."""
    if name not in CONTROL:
        sizes = ", ".join((*CONTROL, "2m"))
        raise UserError(f"size {name} has no control: the arm exists for {sizes} and quickstart")
    return CONTROL[name]


def paper_config(
    size: str,
    arm: str,
    *,
    updates: int,
    batch: int,
    microbatch: int,
    sequence_length: int,
    train_tokens: int,
    peak_lr: float,
    warm_up_updates: int,
    warm_start_updates: int,
    cycle_updates: int,
    low_rank_peak_lr: float,
    prune: Prune,
    restart_warm_up_updates: int = 100,
) -> Config:
    """A run of the paper's table, on C4 with T5's tokenizer; the arguments are what varies with the size.

    Shared: rank 128, scale 1/4, dropout 0.1 on the low-rank branch, 500 low-rank warm-up updates.
    """
    model = llama(control(size) if arm == "control" else size, compute_dtype="bfloat16")
    return Config(
        name=size,
        arm=arm,
        model=model,
        relora=ReloraConfig(
            rank=128,
            alpha=32.0,
            dropout=0.1,
            product="separate",  # fused has no branch to apply dropout to
            base_dtype="bfloat16",  # docs/performance.md: 2m is as good as in float32
            warm_start_updates=0 if arm == "lora" else warm_start_updates,
            cycle_updates=cycle_updates,
            warm_up_updates=500,
            restart_warm_up_updates=restart_warm_up_updates,
            peak_lr=low_rank_peak_lr,
            prune=prune,
        ),
        optimizer=OptimizerConfig(peak_lr=peak_lr, warm_up_updates=warm_up_updates),
        data=DataConfig(
            dataset="c4/en", tokenizer="t5", train_tokens=train_tokens, sequence_length=sequence_length
        ),
        train=TrainConfig(
            updates=updates,
            batch=batch,
            microbatch=microbatch,
            log_every_updates=10,
            evaluate_every_updates=1_000,
            save_every_updates=1_000,
            eval_tokens=10_000_000,
        ),
    )


def kernels(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """{kernel name: (in, out)} of a block."""
    query, value = model.heads * model.head_dim, model.kv_heads * model.head_dim
    d, mlp = model.hidden, model.mlp
    attention = {"q": (d, query), "k": (d, value), "v": (d, value), "o": (query, d)}
    return attention | {"gate": (d, mlp), "up": (d, mlp), "down": (mlp, d)}


def target_kernels(config: Config) -> dict[str, tuple[int, int]]:
    """{kernel name: (in, out)} of the kernels that relora.targets names, singly or by group."""
    targets = set(config.relora.targets)
    names = [n for group, members in KERNELS.items() for n in members if {group, n} & targets]
    return {name: kernels(config.model)[name] for name in names}


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameter counts of a run: the full-rank model's, and those trained and frozen in the last phase."""

    full_rank_total: int
    trained: int
    frozen: int

    @property
    def reduction_percent(self) -> float:
        """100 * (1 - trained / full_rank_total)."""
        return 100 * (1 - self.trained / self.full_rank_total)


def parameters(model: ModelConfig) -> int:
    """The parameter count of the full-rank model."""
    tables = model.vocab_size * model.hidden * (1 if model.tied_embeddings else 2)
    family, sizes = FAMILIES[model.family], kernels(model)
    block = 2 * model.hidden + sum(m * n for m, n in sizes.values())
    block += sum(sizes[name][1] for name in "qkv") if family.qkv_bias else 0
    block += 2 * model.head_dim if family.qk_norm else 0
    return tables + model.hidden + model.layers * block


def count(config: Config) -> Counts:
    """The run's parameter counts, from shapes alone: nothing is allocated."""
    model, total = config.model, parameters(config.model)
    if config.arm not in LOW_RANK_ARMS:
        return Counts(total, total, 0)
    frozen = model.layers * sum(m * n for m, n in target_kernels(config).values())
    trained = total - frozen + trained_factors(config)
    return Counts(total, trained, frozen + (0 if trains_a(config) else _factors(config)[0]))


def trained_factors(config: Config) -> int:
    """The parameters of the factors that are trained; 0 in the arms without factors."""
    of_a, of_b = _factors(config) if config.arm in LOW_RANK_ARMS else (0, 0)
    return of_b + (of_a if trains_a(config) else 0)


def trains_a(config: Config) -> bool:
    """Whether the restart method trains A, as it does B."""
    return restart.parse(config.relora.restart).trains_a


def _factors(config: Config) -> tuple[int, int]:
    """The parameters of all A, and of all B."""
    scale, targets = config.model.layers * config.relora.rank, target_kernels(config).values()
    return scale * sum(m for m, _ in targets), scale * sum(n for _, n in targets)


def matmul_flops_per_token(config: Config, *, low_rank: bool) -> int:
    """FLOPs of the matrix products in an update, per token: 6 for each trained weight, 4 for each frozen one.

    A product with a weight is 2 FLOPs forward, 2 for the gradient of its input, and 2 for its own unless it
    is frozen. Attention adds 12 x length x width: its products are computed for all pairs of positions.
    Not counted: what is computed again (`model.remat`), and the fused A @ B, once a microbatch.
    """
    model, sizes = config.model, kernels(config.model)
    targets = target_kernels(config).values() if low_rank else ()
    weights = sum(m * n for m, n in sizes.values()) * model.layers + model.hidden * model.vocab_size
    frozen = model.layers * sum(m * n for m, n in targets)
    of_a, of_b = _factors(config) if low_rank else (0, 0)
    # the fused form computes y and dx with W + scale * A @ B: only gradients are of the factors
    of_both = 6 * (of_a + of_b) if trains_a(config) else 4 * of_a + 6 * of_b
    if config.relora.product == "fused":
        of_both = (4 if trains_a(config) else 2) * (of_a + of_b)
    attention = 12 * model.layers * config.data.sequence_length * model.heads * model.head_dim
    return 6 * (weights - frozen) + 4 * frozen + of_both + attention
