"""LLaMA-7B's shape: ReLoRA against full-rank and LoRA with a warm start, larger than anything in the paper.

    TEXT="--text=c4/c4-train.*.json.gz --validation_text=c4/c4-validation.*.json.gz"
    python -m relora_jax.prepare --config=configs/7b.py $TEXT        once: packs C4's files into rows
    python -m relora_jax.train --config=configs/7b.py[:ARM] $TEXT    full, control, lora, lora_warm, relora

It reproduces no published result and was not run: docs/scale.md says what it would need.

Published for LLaMA-7B (arXiv 2302.13971): hidden 4096, 32 layers of 32 heads, rows of 2,048, a full-rank rate
of 3e-4 with 2,000 updates of warm-up. With T5's vocabulary it has 6.74B parameters.
As in the paper's 1.3B row: rank 128, a third of the updates as warm start, a cycle of 5,000, pruning .9,
twice the full-rank rate in the low-rank phase.
Our choices for the rest: 1,024 rows an update, base kernels in bfloat16, rematerialized blocks, the control.
"""

from relora_jax import magnitude
from relora_jax.config import Config
from relora_jax.shapes import paper_config


def get_config(arm: str = "relora") -> Config:
    """The config of one arm."""
    config = paper_config(
        "7b",
        arm,
        updates=30_000,
        batch=1_024,
        microbatch=16,
        sequence_length=2048,
        train_tokens=63_000_000_000,  # updates x batch rows, rounded up
        peak_lr=3e-4,
        warm_up_updates=2_000,
        warm_start_updates=10_000,
        cycle_updates=5_000,
        low_rank_peak_lr=6e-4,
        prune=magnitude(0.9),
    )
    config.model.remat = "full"
    return config
