"""The paper's 130M row: ReLoRA against full-rank, LoRA and LoRA with a warm start.

    TEXT="--text=c4/c4-train.*.json.gz --validation_text=c4/c4-validation.*.json.gz"
    python -m relora_jax.prepare --config=configs/130m.py $TEXT        once: packs C4's files into rows
    python -m relora_jax.train --config=configs/130m.py[:ARM] $TEXT    full, control, lora, lora_warm, relora

Published perplexity on C4 (2.6B tokens): full-rank 23.65, LoRA 34.17, LoRA + warm start 25.46, ReLoRA
25.04.
Not run here: the figures are the paper's, as quoted by others.

From the settings published at the time: shape, length, batch, updates, full-rank rate and warm-up, rank,
alpha, dropout, betas, decay, warm start, cycle and its warm-up, pruning.
Our choices for the rest: twice the full-rank rate in the low-rank phase and its warm-up of 500,
concatenated rows, clipping at 1.0 (the first published code has none).
Also ours: bfloat16 compute and base kernels with float32 trained variables, microbatch, intervals, evaluation
tokens.
Needs C4's JSON files, or C4 as a TFDS dataset (without $TEXT; scripts/c4_from_json.py), and T5's tokenizer
(scripts/get_t5_tokenizer.py).
Rows are packed from the first 3.1B tokens of C4: about 19 of its 1,024 train files.
"""

from relora_jax import magnitude
from relora_jax.config import Config
from relora_jax.shapes import paper_config


def get_config(arm: str = "relora") -> Config:
    """The config of one arm."""
    return paper_config(
        "130m",
        arm,
        updates=20_000,
        batch=600,
        microbatch=120,
        sequence_length=256,
        train_tokens=3_100_000_000,  # updates x batch rows, rounded up
        peak_lr=1e-3,
        warm_up_updates=500,
        warm_start_updates=5_000,
        cycle_updates=5_000,
        low_rank_peak_lr=2e-3,
        prune=magnitude(0.99),
    )
