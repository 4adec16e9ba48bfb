"""What one device can hold, compute and send, by the page of its maker."""

from typing import NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device as JAX sees it; rates are peaks, per second.

    `memory_bytes`: what a program may fill. `slice_bytes_per_s` and `network_bytes_per_s`: what a device
    sends to others of its slice (for GPUs: its machine), and beyond it.
    """

    name: str
    platform: str
    memory_bytes: float
    matmul_flops_per_s: float  # bfloat16, dense
    memory_bytes_per_s: float
    slice_bytes_per_s: float
    network_bytes_per_s: float
    source: str


# JAX takes 75% of a GPU's memory by default (docs.jax.dev, "GPU memory allocation"); XLA plans for
# about as much (76%) and beyond that computes values again, without a word.
GPU_SHARE = 0.75
# TPUs: the memory that libtpu says is available; of the interconnect's bandwidth of both directions, half.
_TPU = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 15.75 * GIB, 197e12, 819e9, 400e9 / 2, 6.4e12 / 8 / 256, f"{_TPU}v5e"),
        Chip("v5p", "tpu", 95.74 * GIB, 459e12, 2765e9, 1200e9 / 2, 50e9 / 8, f"{_TPU}v5p"),
        Chip("v6e", "tpu", 31.25 * GIB, 918e12, 1638e9, 800e9 / 2, 100e9 / 8, f"{_TPU}tpu7x"),
        Chip(
            "h100", "cuda", GPU_SHARE * 84978040832, 989e12, 3352e9, 900e9 / 2, 400e9 / 8,
            "https://www.nvidia.com/en-us/data-center/h100/",
        ),
    )
}  # fmt: skip
