"""What restarts are worth in the quickstart's three minutes: its arms, each at its best learning rate.

    python -m relora_jax.study --config=configs/study_quickstart.py[:CHOICE] --extend --workdir=DIR

CHOICE of arms: `main`, the quickstart's, with a warm start and without; `ablation`, the paper's eight rows
(arXiv 2307.05695) and a published mistake. They share the runs of the arms that they share. The model is that
of configs/study_small.py, with more than twice the updates.
"""

from configs import quickstart
from configs.study_small import COLD, HIGH, LOW
from relora_jax import none
from relora_jax.studies.grid import Arm, Study


def get_config(choice: str = "main") -> Study:
    """The study of one choice of arms."""
    arms = {"main": main, "ablation": ablation}
    if choice not in arms:
        raise ValueError(f"the arms {choice!r} must be one of {', '.join(arms)}")
    name = "study_quickstart" if choice == "main" else f"study_quickstart_{choice}"
    return Study(name=name, base=quickstart.get_config(), arms=arms[choice]())


def main() -> dict[str, Arm]:
    """Full rank, LoRA and ReLoRA, the low-rank arms with the quickstart's warm start and without."""
    return {
        "full": Arm(arm="full", rates=HIGH),
        "lora": Arm(arm="lora", rates=LOW, settings=COLD),
        "lora_warm": Arm(arm="lora_warm", rates=LOW),
        "relora_cold": Arm(arm="relora", rates=LOW, settings=COLD),
        "relora": Arm(arm="relora", rates=LOW),
    }


def ablation() -> dict[str, Arm]:
    """The paper's rows: restarts, resets, the jagged rate, the warm start; and code whose A starts at 0.

    Its own arms have three rates around relora_cold's best.
    """
    keep, smooth = {"relora.prune": none()}, {"relora.jagged": False}
    late = {"relora.restart": "merge_and_reinit_late"}
    return main() | {
        "restarts": Arm(arm="relora", rates=LOW[:3], settings=COLD | keep | smooth),
        "restarts_reset": Arm(arm="relora", rates=LOW[:3], settings=COLD | smooth),
        "restarts_jagged": Arm(arm="relora", rates=LOW[:3], settings=COLD | keep),
        "relora_late": Arm(arm="relora", rates=LOW[:3], settings=COLD | late),
    }
