"""The steps of a run, compiled for a mesh: state donated, output shardings pinned.

With donation alone, the partitioner may choose output shardings that differ from the inputs, and the next
update would compile again. Pinned, there are two training programs: before and after the warm start.
"""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relora_jax.config import Config
from relora_jax.data.batches import Batch
from relora_jax.model import attention, sampling
from relora_jax.storage import places
from relora_jax.training import ledger, remat, steps
from relora_jax.training.sharding import on_mesh, padded, row_sharding, shardings
from relora_jax.training.state import TrainState, is_low_rank, without_master
from relora_jax.training.steps import Due, Phase

PROGRAMS = ("full_rank_update", "start_low_rank", "restart", "low_rank_update")
Context = Callable[[jax.Array], AbstractContextManager[Any]]


class Program:
    """The jitted steps of one config on one mesh, and sampling from its model."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.rows = row_sharding(mesh, accumulated=True)
        self.eval_rows = row_sharding(mesh, accumulated=False)
        (self.phase, full), low = _phases(_for_devices(config, mesh))
        # in a checkpoint, and on the devices, where axes that `mesh.tensor` does not divide are padded
        self.full_rank = self.low_rank = _with_shardings(full, mesh)
        self.full_rank_on_devices = self.low_rank_on_devices = self._on_devices(full)
        self._full, self._low = full, full
        init = on_mesh(lambda: steps.init_state(config)[1], mesh)
        self.init = jax.jit(init, out_shardings=self._shardings(full))
        self.init_from = jax.jit(
            on_mesh(partial(steps.initial_state, self.phase), mesh),  # of a restored model, without padding
            donate_argnums=(0, 1),
            out_shardings=self._shardings(full),
        )
        if low is not None:
            start = partial(steps.start_low_rank, config, self.phase)
            self.low_phase, self._low = low
            self.low_rank = _with_shardings(self._low, mesh)
            self.low_rank_on_devices = self._on_devices(self._low)
            out = self._shardings(self._low)
            self.start_low_rank = jax.jit(
                on_mesh(lambda state: start(state)[1], mesh, full), donate_argnums=0, out_shardings=out
            )
            self._restart = jax.jit(
                on_mesh(partial(steps.restart, config, self.low_phase), mesh, self._low),
                donate_argnums=0,
                out_shardings=out,
                static_argnames="reset",
            )
        self._updates: dict[bool, tuple[str, Any]] = {}
        self._eval: dict[bool, Any] = {}
        self._facts: dict[bool, Any] = {}
        self._sample: dict[bool, Any] = {}
        self._hidden: dict[bool, Any] = {}

    def state_at(self, u: int) -> TrainState:
        """Shapes, dtypes and shardings of the state in a checkpoint at u updates."""
        return self.low_rank if u > self.config.low_rank_start else self.full_rank

    def placed(self, state: TrainState) -> TrainState:
        """A restored state, or its model alone, as the steps take it: padded where `mesh.tensor` needs it."""
        return _resized(state, self._on_devices(state))

    def saved(self, state: TrainState) -> TrainState:
        """The state as `state_at` describes it: without padding. Only arrays that have some are copied."""
        return _resized(state, self.low_rank if is_low_rank(state) else self.full_rank)

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
        step = self._update(low=is_low_rank(state))[1]
        updated, metrics = step(without_master(state), batch, learning_rate)
        return dataclasses.replace(updated, master=state.master), metrics

    def remat_policy(self, state: TrainState) -> str:
        """The policy of the updates of the state's phase: `model.remat`, or what `auto` stands for."""
        return self._update(low=is_low_rank(state))[0]

    def restart(self, state: TrainState, *, reset: bool) -> TrainState:
        """`steps.restart`; the state is donated."""
        return self._restart(state, reset=reset)

    def restart_facts(self, state: TrainState, batch: Batch, *, after: bool) -> ledger.Facts:
        """`ledger.facts` of a low-rank state before or after a restart, with one row for each data shard."""
        if after not in self._facts:
            rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]

            def call(state: TrainState, batch: Batch) -> ledger.Facts:
                model = self.low_phase.model(state.trained, state.frozen)
                return ledger.facts(model, state.opt_state, batch, rows=rows, after=after)

            replicated = NamedSharding(self.mesh, PartitionSpec())
            out: Any = (self.eval_rows, replicated, replicated)
            call_on_mesh = on_mesh(call, self.mesh, without_master(self._low))
            self._facts[after] = jax.jit(call_on_mesh, out_shardings=ledger.Facts(*out))
        return self._facts[after](without_master(state), batch)

    def eval_step(self, state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """`steps.eval_step` for the phase of the state."""
        return self.eval_program(low=is_low_rank(state))(state.trained, state.frozen, batch)

    def eval_program(self, *, low: bool) -> Any:
        """The jitted function of (trained, frozen, batch) behind `eval_step`, by phase."""
        if low not in self._eval:
            self._eval[low] = self._of_model(steps.eval_step, low=low)
        return self._eval[low]

    def hidden_states(self, state: TrainState, batch: Batch) -> jax.Array:
        """The residual stream after each block [layers, B, L, D] of a batch's inputs, on every device."""
        low = is_low_rank(state)
        if low not in self._hidden:
            replicated = NamedSharding(self.mesh, PartitionSpec())
            self._hidden[low] = self._of_model(steps.hidden_states, low=low, out_shardings=replicated)
        return self._hidden[low](state.trained, state.frozen, batch)

    def sample(self, state: TrainState, request: sampling.Request) -> tuple[jax.Array, jax.Array]:
        """`sampling.sample` for the phase of the state; the result is replicated on every device."""
        low = is_low_rank(state)
        if low not in self._sample:
            replicated = NamedSharding(self.mesh, PartitionSpec())
            self._sample[low] = self._of_model(sampling.sample, low=low, out_shardings=replicated)
        return self._sample[low](state.trained, state.frozen, request)

    def lower(self, name: str) -> Any:
        """One of PROGRAMS, lowered from the shapes of its arguments: nothing is allocated or computed."""
        match name:
            case "full_rank_update":
                return self._lower_update(self._update(low=False)[1], low=False)
            case "start_low_rank":
                return self.start_low_rank.lower(self.full_rank_on_devices)
            case "restart":
                return self._restart.lower(self.low_rank_on_devices, reset=True)
            case "low_rank_update":
                return self._lower_update(self._update(low=True)[1], low=True)
        raise ValueError(f"name {name!r} must be one of {PROGRAMS}")

    def _abstract_rows(self, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.rows)

    def _update(self, *, low: bool) -> tuple[str, Any]:
        """(policy of rematerialization, jitted update) of a phase."""
        if low not in self._updates:
            policy, limit = self.config.model.remat, remat.limit_bytes(self.mesh)
            if policy == "auto":
                lower = partial(self._lower_update, low=low)
                step = partial(self._train_step, low=low)
                policies = remat.candidates(self.mesh.devices.flat[0].platform, limit)
                policy = remat.chosen(lambda policy: remat.fits(lower(step(policy)), limit), policies)
            self._updates[low] = policy, self._train_step(policy, low=low)
        return self._updates[low]

    def _train_step(self, policy: str, *, low: bool) -> Any:
        """The jitted update of a phase, with a policy of rematerialization."""
        phase, state = (self.low_phase, without_master(self._low)) if low else (self.phase, self._full)
        step = partial(steps.train_step, self.config, dataclasses.replace(phase, remat=policy))
        out = (self._shardings(state), NamedSharding(self.mesh, PartitionSpec()))
        return jax.jit(on_mesh(step, self.mesh, state), donate_argnums=0, out_shardings=out)

    def _lower_update(self, update: Any, *, low: bool) -> Any:
        config, length = self.config, self.config.data.sequence_length + 1
        segments = not config.data.attend_across_documents
        ids = self._abstract_rows(config.accumulation, config.train.microbatch, length)
        lengths = self._abstract_rows(config.accumulation, config.train.microbatch)
        batch = Batch(ids, lengths, ids if segments else None)
        state = without_master(self.low_rank_on_devices) if low else self.full_rank_on_devices
        return update.lower(state, batch, 0.0)

    def _of_model(self, function: Any, *, low: bool, **options: Any) -> Any:
        """function(model, argument), jitted as a function of the model's variables and the argument."""
        phase, like = (self.low_phase, self._low) if low else (self.phase, self._full)

        def call(trained: Any, frozen: Any, argument: Any) -> Any:
            return function(phase.model(trained, frozen), argument)

        return jax.jit(on_mesh(call, self.mesh, like.trained, like.frozen), **options)

    def _on_devices(self, state: TrainState) -> TrainState:
        """Shapes, dtypes and shardings of a state on the devices, where it is padded."""
        return _with_shardings(jax.eval_shape(partial(padded, mesh=self.mesh), state), self.mesh)

    def _shardings(self, state: TrainState) -> Any:
        return shardings(jax.eval_shape(partial(padded, mesh=self.mesh), state), self.mesh)


def enable_compilation_cache() -> None:
    """Turns on JAX's persistent compilation cache, in the user's cache directory unless one is configured."""
    if not jax.config.jax_compilation_cache_dir:  # pyright: ignore
        jax.config.update("jax_compilation_cache_dir", str(places.cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _for_devices(config: Config, mesh: Mesh) -> Config:
    """The config with an implementation of attention that suits the devices."""
    model = dataclasses.replace(config.model, attention=attention.resolved(config, mesh.devices.flat[0]))
    return dataclasses.replace(config, model=model)


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


def _resized(state: TrainState, like: TrainState) -> TrainState:
    """The state with the arrays whose shape differs from `like` cut or padded to it, and placed likewise."""
    arrays, structure = jax.tree.flatten(state)
    wanted = jax.tree.leaves(like)
    changed = [index for index, array in enumerate(arrays) if array.shape != wanted[index].shape]
    to = tuple((wanted[index].shape, wanted[index].sharding) for index in changed)
    for index, array in zip(changed, _fit([arrays[index] for index in changed], to), strict=True):
        arrays[index] = array
    return jax.tree.unflatten(structure, arrays)


@partial(jax.jit, static_argnums=1)
def _fit(arrays: list[jax.Array], to: tuple[tuple[tuple[int, ...], Any], ...]) -> list[jax.Array]:
    """Each array cut or padded with zeros to its (shape, sharding)."""
    fitted = []
    for array, (shape, sharding) in zip(arrays, to, strict=True):
        cut = array[tuple(map(slice, shape))]
        widths = [(0, size - old) for size, old in zip(shape, cut.shape, strict=True)]
        fitted.append(jax.lax.with_sharding_constraint(jnp.pad(cut, widths), sharding))
    return fitted
