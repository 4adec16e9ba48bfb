"""What restarts are worth in the quickstart's three minutes, and what of them: its arms at their best rates.

    python -m relora_jax.study --config=configs/study_quickstart.py --extend --workdir=runs/study_quickstart

The model is that of configs/study_small.py, with more than twice the updates.
"""

from configs import quickstart
from configs.study_small import COLD, HIGH, LOW, ONE_SIDED_WIDE
from relora_jax import none
from relora_jax.studies.grid import Arm, Study


def get_config() -> Study:
    """The arms of the quickstart and the paper's ablation (arXiv 2307.05695), and a published code's mistake.

    Also one-sided factors, with restarts and without. The ablation's rows between lora and relora_cold, and
    relora_late, whose A is 0 until the first merge, have three rates, around relora_cold's best.
    """
    keep, smooth = {"relora.prune": none()}, {"relora.jagged": False}
    late = {"relora.restart": "merge_and_reinit_late"}
    wide = ONE_SIDED_WIDE | {"relora.factor_lr_ratio": 0.25}
    arms = {
        "full": Arm(arm="full", rates=HIGH),
        "lora": Arm(arm="lora", rates=LOW, settings=COLD),
        "restarts": Arm(arm="relora", rates=LOW[:3], settings=COLD | keep | smooth),
        "restarts_jagged": Arm(arm="relora", rates=LOW[:3], settings=COLD | keep),
        "restarts_reset": Arm(arm="relora", rates=LOW[:3], settings=COLD | smooth),
        "relora_cold": Arm(arm="relora", rates=LOW, settings=COLD),
        "relora_late": Arm(arm="relora", rates=LOW[:3], settings=COLD | late),
        "lora_warm": Arm(arm="lora_warm", rates=LOW),
        "relora": Arm(arm="relora", rates=LOW),
        "one_sided_rank32": Arm(arm="relora", rates=LOW, settings=wide),
        "one_sided_rank32_never": Arm(arm="lora_warm", rates=LOW, settings=wide),
    }
    return Study(name="study_quickstart", base=quickstart.get_config(), arms=arms)
