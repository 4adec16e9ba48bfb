"""The memory that programs on a CPU are run in."""

import ctypes
import sys
from importlib.util import find_spec

import jax

ACCELERATORS = ("jax_plugins", "libtpu")  # modules that bring their platforms
# of glibc's malloc.h: do not give memory back; no memory outside the heap; one heap for all threads
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> None:
    """Where there is only a CPU: the process keeps what it frees, until it ends; call it before JAX starts.

    XLA allocates the temporaries of a program at each run. From glibc's malloc, such large blocks are pages
    that the kernel gives anew and fills with zeros each time they are first touched.
    """
    platforms = jax.config.jax_platforms  # pyright: ignore
    only_cpu = platforms == "cpu" if platforms else not any(map(find_spec, ACCELERATORS))
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if only_cpu and mallopt is not None:
        for parameter, value in ((TRIM_THRESHOLD, -1), (MMAP_MAX, 0), (ARENA_MAX, 1)):
            mallopt(parameter, value)
