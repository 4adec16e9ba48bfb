"""One column of the benchmark: what was measured of an arm, or compiled for it, and what follows from that.

MFU = FLOPs of the model / (time x peak): the FLOPs of a token are those of the products that the update needs
(shapes.matmul_flops_per_token), the peak is the chip's in bfloat16. Both say nothing of what was computed
again.
"""

import dataclasses
import statistics
from typing import Any

import numpy as np

from relora_jax import shapes
from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.planning.compiled import Memory


@dataclasses.dataclass(frozen=True)
class Column:
    """Times in seconds, memory in bytes of one device; None is not known.

    `step_s`: of an update, in the order of the rounds; as compiled, its one roofline, of which `causes_s`
    says what each cause takes (`expected.causes_s`). `memory` is `compiled_bytes` by purpose.
    """

    name: str
    config: Config
    peak_flops_per_s: float | None  # of all devices
    step_s: tuple[float, ...]
    restart_s: float | None = None
    causes_s: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: Memory | None = None
    compiled_bytes: float | None = None  # what the update needs
    peak_bytes: float | None = None  # what the device says that it held

    @property
    def median_s(self) -> float:
        """The median step."""
        return statistics.median(self.step_s)

    @property
    def quartiles_s(self) -> tuple[float, float]:
        """The first and third quartile of the step."""
        low, high = np.percentile(self.step_s, (25, 75))
        return float(low), float(high)

    @property
    def tokens_per_s(self) -> float:
        """Targets of an update over the median step."""
        return self.config.train.batch * self.config.data.sequence_length / self.median_s

    @property
    def flops_per_token(self) -> int:
        """What the model needs."""
        return shapes.matmul_flops_per_token(self.config, low_rank=self.config.arm in LOW_RANK_ARMS)

    @property
    def mfu(self) -> float | None:
        """The share of the peak that the model's FLOPs take."""
        return self.peak_flops_per_s and self.flops_per_token * self.tokens_per_s / self.peak_flops_per_s

    @property
    def restart_share(self) -> float | None:
        """The time of a restart over that of a cycle of such updates."""
        return self.restart_s and self.restart_s / (self.config.relora.cycle_updates * self.median_s)

    def ratio(self, first: "Column") -> float:
        """The median, over the rounds, of the step over that of another column in the same round."""
        return statistics.median(a / b for a, b in zip(self.step_s, first.step_s, strict=True))

    def memory_ratio(self, first: "Column") -> float | None:
        """The compiled memory over that of another column."""
        mine, other = self.compiled_bytes, first.compiled_bytes
        return mine / other if mine and other else None

    def facts(self, first: "Column") -> dict[str, Any]:
        """The column as JSON has it."""
        return {
            "name": self.name,
            "arm": self.config.arm,
            "step_s": list(self.step_s),
            "step_median_s": self.median_s,
            "step_quartiles_s": self.quartiles_s,
            "step_to_first": self.ratio(first),
            "causes_s": self.causes_s or None,
            "tokens_per_s": self.tokens_per_s,
            "model_flops_per_token": self.flops_per_token,
            "mfu": self.mfu,
            "peak_bytes": self.peak_bytes,
            "compiled_bytes": self.compiled_bytes,
            "memory": self.memory and self.memory._asdict(),
            "compiled_bytes_to_first": self.memory_ratio(first),
            "restart_s": self.restart_s,
            "restart_share_of_cycle": self.restart_share,
        }
