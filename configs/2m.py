"""A model of 1.8M parameters at which speed, memory and base types are measured on two CPU cores.

    python -m relora_jax.train --config=configs/2m.py[:ARM]    full, control, lora, lora_warm, relora

On the State of the Union addresses. It reproduces no published result: all settings are ours. Expect 2
minutes with cold caches, validation perplexity 204 (the unigram distribution has 724), and a summed update of
rank 96 = 6 r. One seed each: full 224, control 211, lora 714, lora_warm 203, relora 204. The rates were only
roughly tuned, so this order means little (benchmarks/quickstart_cpu.json has what was tried, under an earlier
name).
"""

from relora_jax import magnitude
from relora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReloraConfig, TrainConfig

VOCAB_SIZE = 4096


def get_config(arm: str = "relora") -> Config:
    """The config of one arm; our `control` is narrower, with about as many parameters as `relora` trains."""
    hidden, mlp = (96, 264) if arm == "control" else (128, 352)
    return Config(
        name="2m",
        arm=arm,
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden=hidden,
            mlp=mlp,
            layers=4,
            heads=4,
            kv_heads=4,
            head_dim=hidden // 4,
            compute_dtype="float32",
        ),
        relora=ReloraConfig(
            rank=16,
            alpha=16.0,
            product="fused",  # measured: 1.05 x the time of full, separate 1.17 x (bench)
            base_dtype="float32",
            warm_start_updates=0 if arm == "lora" else 60,
            cycle_updates=30,
            warm_up_updates=5,
            restart_warm_up_updates=5,
            peak_lr=1e-2,
            prune=magnitude(0.9),
        ),
        optimizer=OptimizerConfig(peak_lr=2.5e-3, warm_up_updates=20),
        data=DataConfig(
            dataset="sotu",
            train_split="train",
            validation_split="validation",
            tokenizer=f"bpe({VOCAB_SIZE})",
            sequence_length=128,
        ),
        train=TrainConfig(
            updates=240,
            batch=16,
            microbatch=16,
            log_every_updates=1,
            evaluate_every_updates=80,
            save_every_updates=60,
            eval_tokens=32_768,
        ),
    )
