"""ReLoRA on the State of the Union addresses, in minutes on two laptop cores.

    python -m relora_jax.train --config=configs/quickstart.py[:ARM]    full, control, lora, lora_warm, relora

It reproduces no published result: it shows what restarts are for at a size that anyone can run, with a rank
so small that one low-rank update does not suffice. All settings are ours; the rates of all arms but `control`
are the best that configs/study_quickstart.py tried (docs/results.md has every arm with its seeds).
"""

from relora_jax import magnitude
from relora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReloraConfig, TrainConfig

VOCAB_SIZE, RANK = 1024, 2


def get_config(arm: str = "relora") -> Config:
    """The config of one arm; our `control` is narrower, with about as many parameters as `relora` trains."""
    hidden, mlp, heads = (56, 112, 4) if arm == "control" else (96, 256, 3)
    return Config(
        name="quickstart",
        arm=arm,
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden=hidden,
            mlp=mlp,
            layers=3,
            heads=heads,
            kv_heads=heads,
            head_dim=hidden // heads,
            compute_dtype="float32",
        ),
        relora=ReloraConfig(
            rank=RANK,
            alpha=float(RANK),
            product="fused",
            base_dtype="float32",
            warm_start_updates=0 if arm == "lora" else 170,
            cycle_updates=340,
            warm_up_updates=20,
            restart_warm_up_updates=10,
            peak_lr=8e-3,
            factor_lr_ratio=0.5,
            prune=magnitude(0.9),
        ),
        # kernels bear smaller rates than embeddings and the head, a warm start smaller ones than a whole run
        optimizer=OptimizerConfig(
            peak_lr=1.6e-2 if arm in ("full", "control") else 4e-3, warm_up_updates=20, kernel_lr_ratio=0.1
        ),
        data=DataConfig(
            dataset="sotu",
            train_split="train",
            validation_split="validation",
            tokenizer=f"bpe({VOCAB_SIZE})",
            sequence_length=64,
        ),
        train=TrainConfig(
            updates=3400,
            batch=16,
            microbatch=16,
            log_every_updates=10,
            evaluate_every_updates=340,
            save_every_updates=170,
            eval_tokens=32_768,
        ),
    )
