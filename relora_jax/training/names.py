"""Names of a run's arrays: their paths in the model and in a checkpoint.

    embed/embedding  norm/scale  head/kernel                 outside of the blocks
    blocks/attention/q/kernel  blocks/mlp_norm/scale  ...    the blocks, stacked on the layers axis
    blocks/attention/q/bias  blocks/attention/q_norm/scale   in some families
    .../lora_a  .../lora_b                                   the factors next to a frozen kernel

A checkpoint holds trained/PATH, frozen/PATH and opt_state/...: the fields of `TrainState`.
"""

from relora_jax.shapes import KERNELS

BLOCKS = "blocks"
EMBEDDING, FINAL_NORM, HEAD = "embed/embedding", "norm/scale", "head/kernel"
# {q: blocks/attention/q, ...}: the layers whose kernels can become low-rank
LAYERS = {name: f"{BLOCKS}/{group}/{name}" for group, names in KERNELS.items() for name in names}


def kernel_of(layer: str) -> str:
    """The path of a layer's kernel: blocks/attention/q -> blocks/attention/q/kernel."""
    return f"{layer}/kernel"


def bias_of(layer: str) -> str:
    """The path of a layer's bias: blocks/attention/q -> blocks/attention/q/bias."""
    return f"{layer}/bias"


def norm(name: str) -> str:
    """The path of a block's norm: mlp_norm -> blocks/mlp_norm/scale."""
    return f"{BLOCKS}/{name}/scale"


def is_stacked(path: str) -> bool:
    """Whether a variable of the model has a layers axis."""
    return path.startswith(f"{BLOCKS}/")


def layer_of(path: str) -> str:
    """The layer that a variable belongs to: blocks/attention/q/kernel -> blocks/attention/q."""
    return path.rpartition("/")[0]


def factors(layer: str) -> tuple[str, str]:
    """The paths of a layer's A and B."""
    return f"{layer}/lora_a", f"{layer}/lora_b"


def is_factor(path: str) -> bool:
    """Whether a variable, of the model or in a checkpoint, is a factor."""
    return path.rpartition("/")[2] in ("lora_a", "lora_b")


def trained(path: str) -> str:
    """The checkpoint path of a trained variable of the model."""
    return f"trained/{path}"


def frozen(path: str) -> str:
    """The checkpoint path of a frozen variable of the model."""
    return f"frozen/{path}"


def in_model(path: str) -> str:
    """The model path of a checkpoint path under trained/ or frozen/."""
    return path.partition("/")[2]


def is_frozen(path: str) -> bool:
    """Whether a checkpoint path is that of a frozen variable."""
    return path.startswith("frozen/")


def is_moment(path: str) -> bool:
    """Whether a checkpoint path belongs to the optimizer's state."""
    return path.startswith("opt_state/")
