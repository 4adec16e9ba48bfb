"""The small study: full-rank and low-rank arms of one model, at a rank that binds, on two CPU cores.

    python -m relora_jax.study --config=configs/study_small.py[:CHOICE] --extend --workdir=runs/study_small

CHOICE of arms: `main`, what a user may pick; `controls`, what of one_sided and of a restart does what;
`scale`, the gap to full rank at this size, at the published code's 9m shape and at a larger one. They share
the runs of the arms that they share.
"""

import dataclasses
from typing import Any

from configs import quickstart
from configs.quickstart import RANK
from relora_jax import zero
from relora_jax.config import Config
from relora_jax.studies.grid import Arm, Study


def of_rank(rank: int) -> dict[str, Any]:
    """The settings of a rank, with alpha as large."""
    return {"relora.rank": rank, "relora.alpha": float(rank)}


COLD = {"relora.warm_start_updates": 0}
BOTH = {"relora.factor_lr_ratio": 0.5}  # of two factors
# At twice the rank, as many bytes of weights, moments and gradients as relora. At rank 32, still fewer bytes
# in all: the backward pass keeps the input's product with A, not the input, unless it recomputes the blocks.
ONE_SIDED = {"relora.restart": "one_sided"} | of_rank(2 * RANK)
ONE_SIDED_WIDE = ONE_SIDED | of_rank(32)


def get_config(choice: str = "main") -> Study:
    """The study of one choice of arms."""
    arms = {"main": main, "controls": controls, "scale": scale}
    if choice not in arms:
        raise ValueError(f"the arms {choice!r} must be one of {', '.join(arms)}")
    name = "study_small" if choice == "main" else f"study_small_{choice}"
    return Study(name=name, base=base(), arms=arms[choice]())


def base() -> Config:
    """The quickstart's settings, which all runs share, with fewer updates.

    Kernels and factors bear smaller rates than embeddings and the head, which pilots looked for: with one for
    all, an arm is only as good as its compromise between the two.
    """
    config = quickstart.get_config()
    config.relora.factor_lr_ratio = 0.25
    config.relora.warm_start_updates, config.relora.cycle_updates = 75, 150
    config.relora.peak_lr = config.optimizer.peak_lr = 1.6e-2
    config.train.updates, config.train.log_every_updates = 1500, 5
    config.train.evaluate_every_updates, config.train.save_every_updates = 150, 75
    return config


LOW, HIGH = (4e-3, 8e-3, 1.6e-2, 3.2e-2), (8e-3, 1.6e-2, 3.2e-2, 6.4e-2)


def main() -> dict[str, Arm]:
    """Full-rank optimizers and low-rank arms, with a warm start and without.

    Updates of kernels by muon and galore have about 0.2 of the rate as their RMS, without a further ratio.
    """
    own: dict[str, Any] = {"optimizer.kernel_lr_ratio": 1.0}
    galore = {"optimizer.name": f"galore({RANK * 8}, {base().relora.cycle_updates})"}
    return {
        "full": Arm(arm="full", rates=HIGH),
        "muon": Arm(arm="full", rates=LOW, settings=own | {"optimizer.name": "muon"}),
        "scale": Arm(arm="full", rates=LOW, settings={"optimizer.name": "scale"}),
        "lora_warm": Arm(arm="lora_warm", rates=LOW, settings=BOTH),
        "relora": Arm(arm="relora", rates=LOW, settings=BOTH),
        "one_sided": Arm(arm="relora", rates=LOW, settings=ONE_SIDED),
        "one_sided_rank32": Arm(arm="relora", rates=LOW, settings=ONE_SIDED_WIDE),
        "galore": Arm(arm="full", rates=HIGH, settings=own | galore),
        "lora": Arm(arm="lora", rates=LOW, settings=COLD | BOTH),
        "relora_cold": Arm(arm="relora", rates=LOW, settings=COLD | BOTH),
        "one_sided_cold": Arm(arm="relora", rates=LOW, settings=COLD | ONE_SIDED),
        "one_sided_rank32_cold": Arm(arm="relora", rates=LOW, settings=COLD | ONE_SIDED_WIDE),
    }


def controls() -> dict[str, Arm]:
    """What one_sided and relora owe to their restarts, cycles, resets, ranks, factor rates and b2.

    Shorter cycles warm up for 5 updates, not 10, after a restart. Three rates, around the best of `relora`.
    """

    def of(settings: dict[str, Any], arm: str = "relora") -> Arm:
        return Arm(arm=arm, rates=LOW[1:], settings=settings)

    def cycle(updates: int) -> dict[str, Any]:
        warm_up = {"relora.warm_up_updates": 5, "relora.restart_warm_up_updates": 5}
        return {"relora.cycle_updates": updates} | warm_up

    b2 = {"optimizer.b2": 0.95}
    shared = ("full", "lora_warm", "relora", "one_sided", "one_sided_rank32")
    return {name: main()[name] for name in shared} | {
        "one_sided_never": of(ONE_SIDED, "lora_warm"),
        "one_sided_rank32_never": of(ONE_SIDED_WIDE, "lora_warm"),
        "one_sided_zero": of(ONE_SIDED | {"relora.prune": zero()}),
        "one_sided_b2": of(ONE_SIDED | b2),
        "one_sided_15": of(ONE_SIDED | cycle(15)),
        "one_sided_50": of(ONE_SIDED | cycle(50)),
        "one_sided_rank2": of(ONE_SIDED | of_rank(RANK)),
        "one_sided_rank8": of(ONE_SIDED | of_rank(8)),
        "one_sided_rank12": of(ONE_SIDED | of_rank(12)),
        "one_sided_ratio": of(ONE_SIDED | BOTH),
        "one_sided_orthonormal": of(ONE_SIDED | {"relora.restart": "one_sided_orthonormal"}),
        "relora_b2": of(BOTH | b2),
        "relora_15": of(BOTH | cycle(15)),
        "relora_50": of(BOTH | cycle(50)),
        "relora_rank4": of(BOTH | of_rank(2 * RANK)),
        "relora_rank16": of(BOTH | of_rank(16)),
    }


def scale() -> dict[str, Arm]:
    """Full rank and the warm-started low-rank arms at two more sizes, with three rates."""
    names = ("full", "lora_warm", "relora", "one_sided_rank32", "one_sided")
    sizes = {"9m": (128, 352, 4), "larger": (160, 432, 5)}
    arms = {name: main()[name] for name in names} | {"one_sided_rank12": controls()["one_sided_rank12"]}
    larger = {}
    for size, (hidden, mlp, layers) in sizes.items():
        shape = {"hidden": hidden, "mlp": mlp, "layers": layers, "heads": layers, "kv_heads": layers}
        settings = {f"model.{field}": value for field, value in shape.items()}
        for name, arm in arms.items():
            larger[f"{name}@{size}"] = dataclasses.replace(
                arm,
                rates=HIGH[:3] if name == "full" else LOW[1:],  # a larger model bears no larger ones
                settings={**arm.settings, **settings},
                reference=f"full@{size}",
            )
    del larger["one_sided@larger"]  # of rank 4: behind relora at two sizes
    return arms | larger
