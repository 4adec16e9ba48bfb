"""The steps of a run, compiled for a mesh: state donated, output shardings pinned.

With donation alone, the partitioner may choose output shardings that differ from the inputs, and the next
update would compile again. Pinned, there are two training programs: before and after the warm start.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relora_jax.config import Config
from relora_jax.data.batches import Batch
from relora_jax.model import sampling
from relora_jax.storage import places
from relora_jax.training import steps
from relora_jax.training.sharding import row_sharding, shardings
from relora_jax.training.state import TrainState, is_low_rank
from relora_jax.training.steps import Due, Phase

Context = Callable[[jax.Array], AbstractContextManager[Any]]


class Program:
    """The jitted steps of one config on one mesh, and sampling from its model."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.rows = row_sharding(mesh, accumulated=True)
        self.eval_rows = row_sharding(mesh, accumulated=False)
        (self.phase, full), low = _phases(config)
        self.full_rank = self.low_rank = _with_shardings(full, mesh)
        self.init = jax.jit(lambda: steps.init_state(config)[1], out_shardings=shardings(full, mesh))
        self.init_from = jax.jit(
            partial(steps.initial_state, self.phase),
            donate_argnums=(0, 1),
            out_shardings=shardings(full, mesh),
        )
        self._train = self._train_step(self.phase, full)
        if low is not None:
            start = partial(steps.start_low_rank, config, self.phase)
            self.low_phase, low = low
            self.low_rank = _with_shardings(low, mesh)
            out = shardings(low, mesh)
            self.start_low_rank = jax.jit(lambda state: start(state)[1], donate_argnums=0, out_shardings=out)
            self._restart = jax.jit(
                partial(steps.restart, config, self.low_phase),
                donate_argnums=0,
                out_shardings=out,
                static_argnames="reset",
            )
            self._low_train = self._train_step(self.low_phase, low)
        self._eval: dict[bool, Any] = {}
        self._sample: dict[bool, Any] = {}

    def state_at(self, u: int) -> TrainState:
        """Shapes, dtypes and shardings of the state in a checkpoint at u updates."""
        return self.low_rank if u > self.config.low_rank_start else self.full_rank

    def begin_update(
        self, u: int, state: TrainState, *, context: Context = nullcontext
    ) -> tuple[TrainState, Due]:
        """(state, what was due): starts the low-rank phase or restarts, if either is due at update u.

        If so, the state is donated, and the work runs inside `context(state.update)`, such as a paused clock.
        """
        due = steps.due(self.config, u)
        if not any(due):
            return state, due
        with context(state.update):
            state = self.start_low_rank(state) if due.start_low_rank else self.restart(state, reset=due.reset)
        return state, due

    def train_step(
        self, state: TrainState, batch: Batch, learning_rate: float
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """`steps.train_step` for the phase of the state; the state is donated."""
        return (self._low_train if is_low_rank(state) else self._train)(state, batch, learning_rate)

    def restart(self, state: TrainState, *, reset: bool) -> TrainState:
        """`steps.restart`; the state is donated."""
        return self._restart(state, reset=reset)

    def eval_step(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """`steps.eval_step` for the phase of the state."""
        low = is_low_rank(state)
        if low not in self._eval:
            self._eval[low] = jax.jit(partial(steps.eval_step, self.low_phase if low else self.phase))
        return self._eval[low](state.trained, state.frozen, batch)

    def sample(self, state: TrainState, request: sampling.Request) -> tuple[jax.Array, jax.Array]:
        """`sampling.sample` for the phase of the state; the result is replicated on every device."""
        low = is_low_rank(state)
        if low not in self._sample:
            phase = self.low_phase if low else self.phase
            self._sample[low] = jax.jit(
                lambda trained, frozen, request: sampling.sample(phase.model(trained, frozen), request),
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
        return self._sample[low](state.trained, state.frozen, request)

    def _train_step(self, phase: Phase, state: TrainState) -> Any:
        return jax.jit(
            partial(steps.train_step, self.config, phase),
            donate_argnums=0,
            out_shardings=(shardings(state, self.mesh), None),
        )


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory unless one is configured."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str(places.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def abstract_state(config: Config, u: int) -> TrainState:
    """Shapes and dtypes of the state in a checkpoint at u updates."""
    (_, full), low = _phases(config)
    return low[1] if low is not None and u > config.low_rank_start else full


def _phases(config: Config) -> tuple[tuple[Phase, TrainState], tuple[Phase, TrainState] | None]:
    """(phase, abstract state) of the full-rank and the low-rank phase; None if there is no low-rank phase."""
    phase, full = _abstract(partial(steps.init_state, config))
    if config.low_rank_start >= config.train.updates:
        return (phase, full), None
    return (phase, full), _abstract(partial(steps.start_low_rank, config, phase), full)


def _abstract(create: Any, *args: Any) -> tuple[Phase, TrainState]:
    """The (phase, state) that `create` returns, the state as shapes and dtypes only."""
    phases: list[Phase] = []

    def create_state(*args: Any) -> TrainState:
        phase, state = create(*args)
        phases.append(phase)
        return state

    shapes = jax.eval_shape(create_state, *args)
    return phases[0], shapes


def _with_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    def with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, state, shardings(state, mesh))
