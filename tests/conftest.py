"""The suite runs on 8 simulated CPU devices, with jaxtyping shapes checked by beartype."""

import os
import pathlib

import jax
from jaxtyping import install_import_hook

import tests.support.checked  # noqa: F401 (the hook imports it by name)

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Compilation dominates the suite's time, so LLVM's passes are skipped (XLA's own are not).
jax.config.update("jax_disable_most_optimizations", True)
# Programs that another test or an earlier run of the suite compiled are loaded from disk.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parents[1] / ".pytest_cache/xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
os.environ["JAX_PLATFORMS"] = "cpu"  # for the processes that tests start

install_import_hook("relora_jax", "tests.support.checked.check")
pytest_plugins = [
    "tests.support.emulator",
    "tests.support.own_text",
    "tests.support.reports",
]  # their fixtures
