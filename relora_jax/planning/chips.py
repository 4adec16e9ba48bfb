"""What one device can hold, compute and send, by the page of its maker."""

from typing import Any, NamedTuple

GIB = 2**30


class Chip(NamedTuple):
    """One device as JAX sees it; rates are peaks, per second.

    `kinds`: what JAX calls it (`device.device_kind`). `memory_bytes`: what a program may fill.
    `slice_bytes_per_s` and `network_bytes_per_s`: what a device sends to others of its slice (for GPUs: its
    machine), and beyond it. `eight_bit_types`: those of HLO that it multiplies at twice the peak.
    """

    name: str
    platform: str
    kinds: tuple[str, ...]
    memory_bytes: float
    matmul_flops_per_s: float  # bfloat16, dense
    memory_bytes_per_s: float
    slice_bytes_per_s: float
    network_bytes_per_s: float
    source: str
    eight_bit_types: tuple[str, ...] = ("s8",)


# JAX takes 75% of a GPU's memory by default (docs.jax.dev, "GPU memory allocation"); XLA plans for
# about as much (76%) and beyond that computes values again, without a word.
GPU_SHARE = 0.75
# TPUs: the memory that libtpu says is available; of the interconnect's bandwidth of both directions, half.
_TPU = "https://docs.cloud.google.com/tpu/docs/"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e", "tpu", ("TPU v5e", "TPU v5 lite"), 15.75 * GIB, 197e12, 819e9, 400e9 / 2,
            6.4e12 / 8 / 256, f"{_TPU}v5e",
        ),
        Chip(
            "v5p", "tpu", ("TPU v5p", "TPU v5"), 95.74 * GIB, 459e12, 2765e9, 1200e9 / 2,
            50e9 / 8, f"{_TPU}v5p",
        ),
        Chip(
            "v6e", "tpu", ("TPU v6e", "TPU v6 lite"), 31.25 * GIB, 918e12, 1638e9, 800e9 / 2,
            100e9 / 8, f"{_TPU}tpu7x",
        ),
        Chip(
            "h100", "cuda", ("NVIDIA H100 80GB HBM3",), GPU_SHARE * 84978040832, 989e12, 3352.32e9, 900e9 / 2,
            400e9 / 8, "https://www.nvidia.com/en-us/data-center/h100/", ("s8", "f8e4m3fn"),
        ),
        Chip(
            "h200", "cuda", ("NVIDIA H200",), GPU_SHARE * 141e9, 989e12, 4800e9, 900e9 / 2,
            400e9 / 8, "https://www.nvidia.com/en-us/data-center/h200/", ("s8", "f8e4m3fn"),
        ),
    )
}  # fmt: skip


def of_device(device: Any) -> Chip | None:
    """The chip that a device of JAX is; None if it is not in the table, as a CPU."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)
