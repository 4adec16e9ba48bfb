"""What the last phase of an arm needs of one device's memory, by purpose."""

import dataclasses

import jax

from relora_jax.config import LOW_RANK_ARMS, Config
from relora_jax.planning.compiled import Memory, device_bytes
from relora_jax.training.program import Program
from relora_jax.training.remat import used_bytes
from relora_jax.training.sharding import make_mesh


def memory(config: Config, *, remat: str = "") -> Memory:
    """Bytes of weights, moments and gradients from shapes, and of temporaries from the compiled update.

    `remat`: in place of the config's own policy of rematerialization.
    """
    if remat:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
    program = Program(config, make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1]))
    low_rank = config.arm in LOW_RANK_ARMS
    state = program.low_rank_on_devices if low_rank else program.full_rank_on_devices
    sizes = [device_bytes(part) for part in ((state.trained, state.frozen), state.opt_state, state.trained)]
    used = used_bytes(program.lower("low_rank_update" if low_rank else "full_rank_update").compile())
    return Memory(*sizes, temporaries=max(used - sum(sizes), 0.0))
