"""python -m tests.collectives CONFIG ROWS: megabytes of collectives per microbatch, full and relora.

Compiled for 8 CPU devices in two slices of four: mesh.data = 2 between them, mesh.fsdp = 4 within each, and
ROWS rows per microbatch. Nothing is allocated. On CPU, XLA moves bfloat16 as float32.
"""

import runpy
import sys

import jax
import jax.numpy as jnp

from relora_jax.data.batches import Batch
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh
from tests.support import hlo

DATA, FSDP = 2, 4


def main(path: str, rows: int) -> None:
    """Prints a line for each arm."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DATA * FSDP)
    for arm in ("full", "relora"):
        config = runpy.run_path(path)["get_config"](arm)
        config.train.batch = config.train.microbatch = rows
        program = Program(config, make_mesh(data=DATA, fsdp=FSDP, tensor=1, devices=jax.devices()))
        shapes = ((1, rows, config.data.sequence_length + 1), (1, rows))
        batch = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=program.rows) for shape in shapes]
        if arm == "full":
            lowered = program._update(low=False)[1].lower(program.full_rank_on_devices, Batch(*batch), 1e-3)
        else:
            lowered = program._update(low=True)[1].lower(program.low_rank_on_devices, Batch(*batch), 1e-3)
        collectives = hlo.collectives(lowered.compile().as_text())
        between = sum(c.total for c in collectives if c.crosses(DATA)) / 1e6
        within = sum(c.total for c in collectives if not c.crosses(DATA)) / 1e6
        print(f"{config.name}, {arm}: between slices {between:,.1f} MB, within {within:,.1f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
