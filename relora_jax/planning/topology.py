"""A topology's name -> its devices, which can be compiled for but not run on: no accelerator is started."""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from importlib.resources import files
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from relora_jax.errors import UserError
from relora_jax.planning.chips import CHIPS, Chip

# libtpu would ask Google Cloud's metadata server where it runs, and refuse to be loaded beside a running job.
LIBTPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
PLUGINS = {  # platform: (one of these modules must be installed, the extra that brings it)
    "tpu": (("libtpu",), "tpu"),
    "cuda": (("jax_cuda13_plugin", "jax_cuda12_plugin"), "plan-cuda"),
}
KNOWN = "v5e:4x4, v5e:16x16, v5p:2x2x2, v6e:4x4, h100:1, h100:8, h200:8"


class Topology(NamedTuple):
    """Devices of one kind of chip, slice after slice; `slice_size` of them in each."""

    name: str
    chip: Chip
    devices: list[Any]
    slice_size: int


def make_topology(name: str, *, slices: int = 1) -> Topology:
    """The topology CHIP:SHAPE, `slices` times; UserError for an unknown one or a plugin that is missing."""
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    pattern = r"[1-9]\d*" if chip and chip.platform == "cuda" else r"[1-9]\d*(x[1-9]\d*){1,2}"
    if chip is None or not re.fullmatch(pattern, shape):
        raise UserError(
            f"unknown topology {name!r}: write CHIP:SHAPE with CHIP one of {', '.join(CHIPS)}, such as "
            f"{KNOWN}"
        )
    modules, extra = PLUGINS[chip.platform]
    if not any(importlib.util.find_spec(module) for module in modules):
        raise UserError(
            f"--topology={name} needs {' or '.join(modules)}, which is not installed: "
            f"pip install 'relora-jax[{extra}]'"
        )
    os.environ.update({key: value for key, value in LIBTPU.items() if key not in os.environ})
    jax.config.update("jax_platforms", "cpu")  # a plugin that is asked for a topology starts no device
    try:
        with _quiet():
            devices = _devices(chip, shape, slices)
    except Exception as error:  # each plugin has its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{chip.platform} has no topology {name!r} ({reason}): try {KNOWN}") from error
    label = name if slices == 1 else f"{slices} x {name}"
    return Topology(label, chip, devices, len(devices) // slices)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what plugins print, in C, of the hardware that they do not find."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "w") as hidden:
        os.dup2(hidden.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _devices(chip: Chip, shape: str, slices: int) -> list[Any]:
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    name = f"{chip.name}:{shape}"
    if chip.platform == "cuda":
        # An H200 is an H100 with another memory.
        config = files("relora_jax.planning").joinpath("h100.txtpb").read_text()
        config = re.sub(r"(memory_bandwidth: )\d+", rf"\g<1>{int(chip.memory_bytes_per_s)}", config)
        # With the true size XLA would, without a word, compute values again to fit: here it is to say what a
        # program needs, and chips.py what there is.
        config = re.sub(r"(device_memory_size: )\d+", rf"\g<1>{16 * 10**12}", config)
        name, options = chip.name, {"topology": f"{slices}x1x{shape}", "target_config": config}
    topology = topologies.get_topology_desc(platform=chip.platform, topology_name=name, **options)
    return list(topology.devices)
