"""The paper's 60M row: ReLoRA against full-rank, LoRA and LoRA with a warm start.

    python -m relora_jax.prepare --config=configs/60m.py        once: C4 to rows
    python -m relora_jax.train --config=configs/60m.py[:ARM]    full, control, lora, lora_warm, relora

Published perplexity on C4 (1.2B tokens): full-rank 33.81, LoRA 47.44, LoRA + warm start 34.73, ReLoRA
34.46.
Not run here: the figures are the paper's, as quoted by its readers.

From the published settings of that time: shape, length, batch, updates, full-rank rate and warm-up, rank,
alpha, dropout, betas, decay, pruning, the range of the cycle (1-2K) and of its warm-up (50-100).
Ours, where they leave a choice: a warm start of a quarter of the updates (the published script has none,
the published figure looks as if it had one), a cycle of 1,500, its warm-up of 100, in the low-rank phase
a warm-up of 500 and twice the full-rank rate, concatenated rows, clipping at 1.0 (none at first in the
published code).
Ours as well: computing in bfloat16 over float32 variables, microbatch, cadences, evaluation tokens.
Needs C4 as a TFDS dataset (scripts/c4_from_json.py) and T5's tokenizer (scripts/get_t5_tokenizer.py).
Rows are made of the first 1.25B tokens of C4: about 8 of its 1,024 train files.
"""

from relora_jax import magnitude, shapes
from relora_jax.config import Config, DataConfig, OptimizerConfig, ReloraConfig, TrainConfig


def get_config(arm: str = "relora") -> Config:
    """The run of one arm."""
    size = shapes.control("60m") if arm == "control" else "60m"
    return Config(
        name="60m",
        arm=arm,
        model=shapes.llama(size, compute_dtype="bfloat16"),
        relora=ReloraConfig(
            rank=128,
            alpha=32.0,
            dropout=0.1,
            product="apart",  # folded has no branch to drop out of
            base_dtype="float32",
            warm_start_updates=0 if arm == "lora" else 2_500,
            cycle_updates=1_500,
            warm_up_updates=500,
            restart_warm_up_updates=100,
            peak_lr=2e-3,
            prune=magnitude(0.9),
        ),
        optimizer=OptimizerConfig(peak_lr=1e-3, warm_up_updates=500, clip_norm=1.0),
        data=DataConfig(
            dataset="c4/en",
            train_split="train",
            validation_split="validation",
            tokenizer="t5",
            train_tokens=1_250_000_000,  # updates x batch rows, rounded up
            sequence_length=256,
        ),
        train=TrainConfig(
            updates=10_000,
            batch=480,
            microbatch=120,
            log_every_updates=10,
            evaluate_every_updates=1_000,
            save_every_updates=1_000,
            eval_tokens=10_000_000,
        ),
    )
