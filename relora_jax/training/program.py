"""The steps of a run compiled for a mesh: separate programs, state donated, output shardings pinned.

With donation alone the partitioner may choose other output shardings than those it was given, and the
next update compiles again; pinned, there are two training programs, before and after W.
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

Around = Callable[[jax.Array], AbstractContextManager[Any]]


class Program:
    """The jitted steps of one config on one mesh, and the samples of its model."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.rows, self.eval_rows = (
            row_sharding(mesh, accumulated=True),
            row_sharding(mesh, accumulated=False),
        )
        (self.phase, full), low = _phases(config)
        self.full_rank = self.low_rank = _placed(full, mesh)
        self.init = jax.jit(lambda: steps.init_state(config)[1], out_shardings=shardings(full, mesh))
        self.begin_with = jax.jit(
            partial(steps.first_state, self.phase), donate_argnums=(0, 1), out_shardings=shardings(full, mesh)
        )
        self._train = self._train_step(self.phase, full)
        if low is not None:
            start = partial(steps.start_low_rank, config, self.phase)
            self.low_phase, low = low
            self.low_rank = _placed(low, mesh)
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
        """Shapes, types and shardings of the state after u updates, as a checkpoint at u holds it."""
        return self.low_rank if u > self.config.low_rank_start else self.full_rank

    def begin_update(
        self, u: int, state: TrainState, *, around: Around = nullcontext
    ) -> tuple[TrainState, Due]:
        """(state, what was due): the low-rank phase begun, or a restart, where update u begins with one.

        The state is donated then, and all is done inside `around(state.update)`: such as a clock's pause.
        """
        due = steps.due(self.config, u)
        if not any(due):
            return state, due
        with around(state.update):
            state = self.start_low_rank(state) if due.start_low_rank else self.restart(state, reset=due.reset)
        return state, due

    def train_step(
        self, state: TrainState, batch: Batch, learning_rate: float
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """`steps.train_step` of the phase that the state is in; the state is donated."""
        return (self._low_train if is_low_rank(state) else self._train)(state, batch, learning_rate)

    def restart(self, state: TrainState, *, reset: bool) -> TrainState:
        """`steps.restart`; the state is donated."""
        return self._restart(state, reset=reset)

    def eval_step(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """`steps.eval_step` of the phase that the state is in."""
        low = is_low_rank(state)
        if low not in self._eval:
            self._eval[low] = jax.jit(partial(steps.eval_step, self.low_phase if low else self.phase))
        return self._eval[low](state.trained, state.frozen, batch)

    def sample(self, state: TrainState, asked: sampling.Request) -> tuple[jax.Array, jax.Array]:
        """`sampling.sample` by the model of the phase that the state is in; whole on every device."""
        low = is_low_rank(state)
        if low not in self._sample:
            phase = self.low_phase if low else self.phase
            self._sample[low] = jax.jit(
                lambda trained, frozen, asked: sampling.sample(phase.model(trained, frozen), asked),
                out_shardings=NamedSharding(self.mesh, PartitionSpec()),
            )
        return self._sample[low](state.trained, state.frozen, asked)

    def _train_step(self, phase: Phase, state: TrainState) -> Any:
        return jax.jit(
            partial(steps.train_step, self.config, phase),
            donate_argnums=0,
            out_shardings=(shardings(state, self.mesh), None),
        )


def keep_compiled() -> None:
    """Compiled programs are kept for later processes: under the user's cache, or where jax was told to."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str(places.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def abstract_state(config: Config, u: int) -> TrainState:
    """Shapes and types of the state after u updates, as a checkpoint at u holds it."""
    (_, full), low = _phases(config)
    return low[1] if low is not None and u > config.low_rank_start else full


def _phases(config: Config) -> tuple[tuple[Phase, TrainState], tuple[Phase, TrainState] | None]:
    """(phase, shapes and types of its state), full-rank and low-rank; None without the latter."""
    phase, full = _abstract(partial(steps.init_state, config))
    if config.low_rank_start >= config.train.updates:
        return (phase, full), None
    return (phase, full), _abstract(partial(steps.start_low_rank, config, phase), full)


def _abstract(make: Any, *args: Any) -> tuple[Phase, TrainState]:
    """(phase, shapes and types of the state) that `make` gives, without making it."""
    phase: list[Phase] = []

    def state(*args: Any) -> TrainState:
        made, value = make(*args)
        phase.append(made)
        return value

    shapes = jax.eval_shape(state, *args)
    return phase[0], shapes


def _placed(state: TrainState, mesh: Mesh) -> TrainState:
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    return jax.tree.map(place, state, shardings(state, mesh))
