"""The paper's 60M row: ReLoRA against full-rank, LoRA and LoRA with a warm start.

    TEXT="--text=c4/c4-train.*.json.gz --validation_text=c4/c4-validation.*.json.gz"
    python -m relora_jax.prepare --config=configs/60m.py $TEXT        once: packs C4's files into rows
    python -m relora_jax.train --config=configs/60m.py[:ARM] $TEXT    full, control, lora, lora_warm, relora

Published perplexity on C4 (1.2B tokens): full-rank 33.81, LoRA 47.44, LoRA + warm start 34.73, ReLoRA
34.46.
Not run here: the figures are the paper's, as quoted by others.

From the settings published at the time: shape, length, batch, updates, full-rank rate and warm-up, rank,
alpha, dropout, betas, decay, pruning, the range of the cycle (1-2K) and of its warm-up (50-100).
Our choices for the rest: a warm start of a quarter of the updates (the published script has none, but the
published figure suggests one), a cycle of 1,500, its warm-up of 100, in the low-rank phase a warm-up of 500
and twice the full-rank rate, concatenated rows, clipping at 1.0 (the first published code has none).
Also ours: bfloat16 compute and base kernels with float32 trained variables, microbatch, intervals, evaluation
tokens.
Needs C4's JSON files, or C4 as a TFDS dataset (without $TEXT; scripts/c4_from_json.py), and T5's tokenizer
(scripts/get_t5_tokenizer.py).
Rows are packed from the first 1.25B tokens of C4: about 8 of its 1,024 train files.
"""

from relora_jax import magnitude
from relora_jax.config import Config
from relora_jax.shapes import paper_config


def get_config(arm: str = "relora") -> Config:
    """The config of one arm."""
    return paper_config(
        "60m",
        arm,
        updates=10_000,
        batch=480,
        microbatch=120,
        sequence_length=256,
        train_tokens=1_250_000_000,  # updates x batch rows, rounded up
        peak_lr=1e-3,
        warm_up_updates=500,
        warm_start_updates=2_500,
        cycle_updates=1_500,
        low_rank_peak_lr=2e-3,
        prune=magnitude(0.9),
    )
