"""What each restart did, for its row of metrics, and an alarm for factors that nothing trains.

workdir/restarts/UPDATE.npz    the spaces of what was merged (see training/ledger.py)
"""

import io
from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relora_jax.config import Config
from relora_jax.data.batches import Batch
from relora_jax.storage.writer import Writer
from relora_jax.training import ledger, steps
from relora_jax.training.program import Program
from relora_jax.training.state import TrainState

FOLDER = "restarts"
MOMENTS = ("moments_cleared", "moments_asked")  # of a reset alone
QUIET_UPDATES = 20  # without a gradient, until the alarm


class Restarts:
    """Measures a run's restarts. The state before must be measured before the restart donates it."""

    def __init__(self, config: Config, program: Program, writer: Writer, held_out: Batch) -> None:
        self._config, self._program, self._writer, self._held_out = config, program, writer, held_out
        self._before: ledger.Facts | None = None
        self._changes = jax.jit(ledger.changes)
        self._base_rounding = ledger.base_rounding(config.relora.base_dtype)

    def before(self, state: TrainState) -> None:
        """Measures the state that the restart will be given."""
        self._before = self._program.restart_facts(state, self._held_out, after=False)

    def after(self, u: int, state: TrainState, due: steps.Due) -> dict[str, Any]:
        """The fields of the row of the restart at update u, which the state is the result of."""
        before, self._before = self._before, None
        assert before is not None
        after, relora = self._program.restart_facts(state, self._held_out, after=True), self._config.relora
        fields: dict[str, Any] = self._changes(before, after)
        fields |= {"base_rounding": self._base_rounding}
        fields |= {"moments_asked": relora.prune.fraction} if due.reset else dict.fromkeys(MOMENTS)
        if not self._writer.active:
            return fields
        factors = jax.tree.map(np.asarray, before.factors)
        spaces = ledger.spaces(factors)
        earlier = self._read(u - relora.cycle_updates // relora.merges_per_cycle)
        self._writer.write_bytes(FOLDER, f"{u}.npz", _packed(spaces))
        return fields | ledger.merged(factors) | ledger.overlaps(spaces, earlier)

    def _read(self, u: int) -> ledger.Spaces | None:
        file = self._writer.folder / FOLDER / f"{u}.npz"
        if not file.is_file():
            return None
        with np.load(io.BytesIO(file.read_bytes())) as content:
            return {name: np.asarray(content[name], np.float32) for name in content.files}


class QuietFactors:
    """Prints a warning, once, for factors that have had no gradient in so many updates in a row.

    What an update says is looked at later, when the devices have computed it: nothing waits for it.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer, self._raised = writer, False
        self._last: deque[Any] = deque(maxlen=QUIET_UPDATES)
        self._pending: Any = None

    def update(self, u: int, without_gradient: Any, state: TrainState) -> None:
        """Takes what `steps.train_step` says of update u; None in the full-rank phase."""
        if without_gradient is None or self._raised:
            return
        self._last.append(without_gradient)
        if u % QUIET_UPDATES or len(self._last) < QUIET_UPDATES:
            return
        if self._pending is not None and np.any(quiet := np.asarray(self._pending)):
            self._raised = True
            self._warn(u - QUIET_UPDATES, quiet, state)
        self._pending = jnp.all(jnp.stack(self._last), axis=0)

    def _warn(self, u: int, quiet: np.ndarray, state: TrainState) -> None:
        owners = [path for path, array in steps.factors(state.trained) for _ in range(array.shape[0])]
        names = list(dict.fromkeys(name for name, is_quiet in zip(owners, quiet, strict=True) if is_quiet))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        self._writer.print(
            f"warning: factors have had no gradient for {QUIET_UPDATES} updates, up to update {u}: "
            f"{', '.join(names[:3])}{more}; nothing trains them",
            warning=True,
        )


def _packed(spaces: ledger.Spaces) -> bytes:
    """The content of a file, in half precision."""
    stream = io.BytesIO()
    arrays: Any = {name: space.astype(np.float16) for name, space in spaces.items()}
    np.savez(stream, **arrays)
    return stream.getvalue()
