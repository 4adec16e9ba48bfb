"""The small study: full-rank and low-rank arms at about the quickstart's size, on two CPU cores.

python -m relora_jax.study --config=configs/study_small.py --extend
"""

from relora_jax import magnitude
from relora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReloraConfig, TrainConfig
from relora_jax.studies.grid import Arm, Study

VOCAB_SIZE, RANK, UPDATES, WARM_START, CYCLE = 2048, 4, 500, 25, 50


def get_config(_: str = "") -> Study:
    """The study."""
    return Study(name="study_small", base=base(), arms=arms())


def base() -> Config:
    """The settings that all runs share."""
    return Config(
        name="study_small",
        arm="relora",
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden=128,
            mlp=352,
            layers=4,
            heads=4,
            kv_heads=4,
            head_dim=32,
            compute_dtype="float32",
        ),
        relora=ReloraConfig(
            rank=RANK,
            alpha=float(RANK),
            product="fused",
            base_dtype="float32",
            warm_start_updates=WARM_START,
            cycle_updates=CYCLE,
            warm_up_updates=10,
            restart_warm_up_updates=5,
            peak_lr=1e-2,
            prune=magnitude(0.9),
        ),
        optimizer=OptimizerConfig(peak_lr=2e-3, warm_up_updates=20),
        data=DataConfig(
            dataset="sotu",
            train_split="train",
            validation_split="validation",
            tokenizer=f"bpe({VOCAB_SIZE})",
            sequence_length=128,
        ),
        train=TrainConfig(
            updates=UPDATES,
            batch=16,
            microbatch=16,
            log_every_updates=5,
            evaluate_every_updates=100,
            save_every_updates=WARM_START,
            eval_tokens=32_768,
        ),
    )


def arms() -> dict[str, Arm]:
    """The arms by name, and the rates of each."""
    full, low = (1e-3, 2e-3, 4e-3, 8e-3), (5e-3, 1e-2, 2e-2, 4e-2)
    one_sided = {"relora.restart": "one_sided", "relora.rank": 2 * RANK, "relora.alpha": 2.0 * RANK}
    return {
        "full": Arm(arm="full", rates=full),
        "muon": Arm(arm="full", rates=full, settings={"optimizer.name": "muon"}),
        "scale": Arm(arm="full", rates=full, settings={"optimizer.name": "scale"}),
        "lora_warm": Arm(arm="lora_warm", rates=low),
        "relora": Arm(arm="relora", rates=low),
        "one_sided": Arm(arm="relora", rates=low, settings=one_sided),
        "galore": Arm(arm="full", rates=low, settings={"optimizer.name": f"galore({RANK * 8}, {CYCLE})"}),
        "lora": Arm(arm="lora", rates=low, settings={"relora.warm_start_updates": 0}),
    }
