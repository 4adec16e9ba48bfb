"""The paper's 1.3B row: ReLoRA against full-rank and LoRA with a warm start.

    TEXT="--text=c4/c4-train.*.json.gz --validation_text=c4/c4-validation.*.json.gz"
    python -m relora_jax.prepare --config=configs/1b.py $TEXT        once: packs C4's files into rows
    python -m relora_jax.train --config=configs/1b.py[:ARM] $TEXT    full, control, lora, lora_warm, relora

Published perplexity on C4 (23.1B tokens): full-rank 16.83, LoRA + warm start 18.23, ReLoRA 17.27.
Not run here: the figures are the paper's, as quoted by others.

From the settings published at the time: shape, length, batch, updates, full-rank rate and warm-up, rank,
alpha, dropout, betas, decay, updates (30K), warm start (10K), re-warm-up (50).
Our choices for the rest: batch, length and rate of a script from May 2023 whose run was shorter (20K
updates), warm-ups of 1,000 and 500, a cycle of 5,000, pruning .9, twice the full-rank rate in the
low-rank phase, concatenated rows, clipping at 1.0 (the first published code has none).
Also ours: bfloat16 compute and base kernels with float32 trained variables, microbatch, intervals, evaluation
tokens.
Needs C4's JSON files, or C4 as a TFDS dataset (without $TEXT; scripts/c4_from_json.py), and T5's tokenizer
(scripts/get_t5_tokenizer.py).
Rows are packed from the first 30B tokens of C4: about 178 of its 1,024 train files.
"""

from relora_jax import magnitude
from relora_jax.config import Config
from relora_jax.shapes import paper_config


def get_config(arm: str = "relora") -> Config:
    """The config of one arm."""
    return paper_config(
        "1b",
        arm,
        updates=30_000,
        batch=1_920,
        microbatch=64,
        sequence_length=512,
        train_tokens=30_000_000_000,  # updates x batch rows, rounded up
        peak_lr=2e-4,
        warm_up_updates=1_000,
        warm_start_updates=10_000,
        cycle_updates=5_000,
        low_rank_peak_lr=4e-4,
        prune=magnitude(0.9),
        restart_warm_up_updates=50,
    )
