"""The paper's 350M row: ReLoRA against full-rank, LoRA and LoRA with a warm start.

    TEXT="--text=c4/c4-train.*.json.gz --validation_text=c4/c4-validation.*.json.gz"
    python -m relora_jax.prepare --config=configs/350m.py $TEXT        once: packs C4's files into rows
    python -m relora_jax.train --config=configs/350m.py[:ARM] $TEXT    full, control, lora, lora_warm, relora

Published perplexity on C4 (6.8B tokens): full-rank 18.66, LoRA 57.11, LoRA + warm start 19.73, ReLoRA
19.32.
Not run here: the figures are the paper's, as quoted by others.

From the settings published at the time: shape, length, batch, updates, full-rank rate and warm-up, rank,
alpha, dropout, betas, decay, warm start, cycle and its warm-up, pruning.
Our choices for the rest: twice the full-rank rate in the low-rank phase and its warm-up of 500,
concatenated rows, clipping at 1.0 (the first published code has none).
Also ours: bfloat16 compute and base kernels with float32 trained variables, microbatch, intervals, evaluation
tokens.
Needs C4's JSON files, or C4 as a TFDS dataset (without $TEXT; scripts/c4_from_json.py), and T5's tokenizer
(scripts/get_t5_tokenizer.py).
Rows are packed from the first 12B tokens of C4: about 72 of its 1,024 train files.
"""

from relora_jax import magnitude
from relora_jax.config import Config
from relora_jax.shapes import paper_config


def get_config(arm: str = "relora") -> Config:
    """The config of one arm."""
    return paper_config(
        "350m",
        arm,
        updates=20_000,
        batch=1_152,
        microbatch=96,
        sequence_length=512,
        train_tokens=12_000_000_000,  # updates x batch rows, rounded up
        peak_lr=5e-4,
        warm_up_updates=1_000,
        warm_start_updates=5_000,
        cycle_updates=5_000,
        low_rank_peak_lr=1e-3,
        prune=magnitude(0.7),
    )
