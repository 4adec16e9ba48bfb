"""What an arm's last phase holds on one device, by purpose, and how far its kernels have moved."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.planning.compiled import Memory, device_bytes
from relora_jax.reporting import spectrum
from relora_jax.run import record
from relora_jax.training import ledger
from relora_jax.training.program import Program
from relora_jax.training.remat import used_bytes
from relora_jax.training.sharding import make_mesh


def memory(config: Config) -> Memory:
    """Bytes of weights, moments and gradients from shapes, and of temporaries from the compiled update."""
    program = Program(config, make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))
    low_rank = config.arm in LOW_RANK_ARMS
    state = program.low_rank_on_devices if low_rank else program.full_rank_on_devices
    sizes = [device_bytes(part) for part in ((state.trained, state.frozen), state.opt_state, state.trained)]
    used = used_bytes(program.lower("low_rank_update" if low_rank else "full_rank_update").compile())
    return Memory(*sizes, temporaries=max(used - sum(sizes), 0.0))


def spectra(workdir: Path) -> dict[str, np.ndarray] | None:
    """{kind: singular values [layers, side] of the summed update of a run}; None without its checkpoints."""
    from relora_jax.checkpoint.saved import updates_saved  # here: Orbax takes seconds to import
    from relora_jax.checkpoint.variables import variables_of

    run = record.read(workdir)
    relora, start, saved = run.config.relora, run.low_rank_start, updates_saved(workdir)
    if start not in saved or saved[-1] == start:
        return None
    now, then = (variables_of(workdir, update) for update in (saved[-1], start))
    base = {"base_dtype": relora.base_dtype, "base_init": relora.base_init}
    return spectrum.spectra(now, then, scale=relora.alpha / relora.rank, **base)


def effective_rank(values: np.ndarray) -> float:
    """The mean of `ledger.effective_rank` over the layers [layers, side]."""
    return float(np.mean(ledger.effective_rank(jnp.asarray(values))))
