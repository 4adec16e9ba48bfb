"""`model.remat=auto`: the fastest policy of rematerialization with which an update fits its devices.

On accelerators that is "dots" or else "full", found by compiling; "none" keeps most, and is slower than both
because of what it writes and reads (compiled for one H100 at 1.3B: docs/performance.md). On CPUs, "none". The
updates of the two phases may differ. The compilation cache keeps what was compiled: the program chosen is not
compiled again to run.
"""

from collections.abc import Callable
from typing import Any

import jax

from relora_jax.training import processes

POLICIES = ("dots", "full")  # on accelerators, from the fastest to the smallest


def candidates(platform: str, limit_bytes: int) -> tuple[str, ...]:
    """What `auto` may be on such devices; the first, if they do not say their memory (a limit of 0)."""
    if limit_bytes:
        return POLICIES
    return ("none",) if platform == "cpu" else POLICIES[:1]


def chosen(fits: Callable[[str], bool], policies: tuple[str, ...] = POLICIES) -> str:
    """The first policy that fits; the last one is not tried."""
    return next((policy for policy in policies[:-1] if fits(policy)), policies[-1])


def fits(lowered: Any, limit_bytes: int) -> bool:
    """Whether a program fits in a device's memory without computing anything again, on every process."""
    try:
        compiled = lowered.compile()
        own = used_bytes(compiled) <= limit_bytes and ".remat" not in compiled.as_text()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        own = False
    return "no" not in processes.gather("yes" if own else "no")


def limit_bytes(mesh: jax.sharding.Mesh) -> int:
    """What programs may fill of a device's memory; 0 if it does not say, as CPUs do not."""
    try:
        stats = mesh.local_devices[0].memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a device of a topology, which is not there
        stats = {}
    return stats.get("bytes_limit", 0)


def used_bytes(compiled: Any) -> int:
    """The memory of a device that a program needs: what it takes and returns, its temporaries and code."""
    stats = compiled.memory_analysis()
    used = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return used + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes
