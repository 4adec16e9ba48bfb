"""Pure functions of a run's state: init, start of the low-rank phase, restart, train step, eval step.

Independent of devices; program.py compiles them. u counts the updates done, W of which are the warm start,
and s = u - W. Shapes: A microbatches per update, M rows per microbatch, L positions.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax

from relora_jax import shapes
from relora_jax.config import LOW_RANK_ARMS, MAX_CONSECUTIVE_SKIPS, Config
from relora_jax.core import low_rank, schedule
from relora_jax.core import restart as restarts
from relora_jax.core.paths import Path, leaves, path_text, value_of
from relora_jax.data.batches import Batch
from relora_jax.model.llama import Llama
from relora_jax.training import names, optimizer
from relora_jax.training.sharding import as_stored
from relora_jax.training.state import TrainState

# Purposes of random keys, folded in first so that no two uses at one update share a key.
INIT, FACTORS, DROPOUT, REINIT, PRUNE = range(5)


class Due(NamedTuple):
    """What happens at the start of an update: the low-rank phase starts, a merge, or a merge with a reset."""

    start_low_rank: bool = False
    merge: bool = False
    reset: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Phase:
    """The static parts of a phase (before or after the warm start): the model graph, optimizer and policy."""

    graph: Any
    tx: Any
    remat: str  # the policy of its updates

    def model(self, trained: Any, frozen: Any) -> Llama:
        """The model with these variables."""
        model = nnx.merge(self.graph, trained, frozen)
        model.remat = self.remat
        return model


def key(config: Config, purpose: int, update: Any) -> jax.Array:
    """The random key for one purpose at one update."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), purpose), update)


def learning_rate(config: Config, u: int) -> float:
    """The rate of update u: in the warm start a cosine over the whole run, then the low-rank schedule."""
    start, relora, min_lr_ratio = config.low_rank_start, config.relora, config.optimizer.min_lr_ratio
    if u < start:
        warm_up = config.optimizer.warm_up_updates
        return config.optimizer.peak_lr * schedule.multiplier(
            u, total=config.train.updates, warm_up=warm_up, min_lr_ratio=min_lr_ratio
        )
    dips = config.arm == "relora" and relora.jagged
    return relora.peak_lr * schedule.multiplier(
        u - start,
        total=config.train.updates - start,
        warm_up=relora.warm_up_updates,
        min_lr_ratio=min_lr_ratio,
        cycle=relora.cycle_updates if dips else 0,
        restart_warm_up=relora.restart_warm_up_updates,
    )


def due(config: Config, u: int) -> Due:
    """What is due at the start of update u."""
    s, relora = u - config.low_rank_start, config.relora
    if config.arm != "relora" or s <= 0:
        return Due(start_low_rank=s == 0 and config.arm in LOW_RANK_ARMS)
    merge = schedule.is_merge(s, cycle=relora.cycle_updates, merges_per_cycle=relora.merges_per_cycle)
    return Due(merge=merge, reset=schedule.is_reset(s, cycle=relora.cycle_updates))


def restarts_done(config: Config, u: int) -> int:
    """Number of resets in the first u updates."""
    s = u - 1 - config.low_rank_start
    return max(s, 0) // config.relora.cycle_updates if config.arm == "relora" else 0


def is_target(config: Config, path: Path, _: nnx.Linear) -> bool:
    """Whether the low-rank phase freezes the kernel of a linear layer."""
    return "/".join(map(str, path)) in {names.LAYERS[name] for name in shapes.target_kernels(config)}


def init_state(config: Config) -> tuple[Phase, TrainState]:
    """The full-rank phase and its state at u = 0, initialized from the seed."""
    model = Llama(config.model, rngs=nnx.Rngs(key(config, INIT, 0)))
    graph, trained, frozen = nnx.split(model, nnx.Param, low_rank.Frozen)
    phase = Phase(graph, _optimizer(config, trained), config.model.remat)
    return phase, initial_state(phase, trained, frozen)


def initial_state(phase: Phase, trained: Any, frozen: Any) -> TrainState:
    """The state at u = 0 with these variables: zero counters and moments."""
    zero, tokens_seen = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.uint32)
    return TrainState(zero, tokens_seen, zero, zero, trained, frozen, phase.tx.init(trained))


def start_low_rank(config: Config, phase: Phase, state: TrainState) -> tuple[Phase, TrainState]:
    """The low-rank phase and its state: base kernels frozen, factors added, outputs unchanged.

    Embeddings, norms and head keep values, moments and count; those of the factors start at 0. The moments of
    the frozen kernels are dropped.
    """
    relora = config.relora
    method = restarts.parse(relora.restart)
    model = low_rank.wrap(
        phase.model(state.trained, state.frozen),
        rank=relora.rank,
        alpha=relora.alpha,
        targets=partial(is_target, config),
        rngs=nnx.Rngs(params=key(config, FACTORS, state.update)),
        dropout=relora.dropout,
        product=relora.product,
        base_dtype=relora.base_dtype,
        base_init=relora.base_init,
        base_master=relora.base_master == "host",
        frozen_a=method.frozen_a,
    )
    model = method.start(model)
    master = low_rank.take_masters(model)
    graph, trained, frozen = nnx.split(model, nnx.Param, low_rank.Frozen)
    tx = _optimizer(config, trained)
    opt_state = optimizer.carry_over_rest(tx.init(trained), state.opt_state)
    state = dataclasses.replace(state, trained=trained, frozen=frozen, opt_state=opt_state, master=master)
    return Phase(graph, tx, config.model.remat), state


def restart(config: Config, phase: Phase, state: TrainState, *, reset: bool) -> TrainState:
    """The state after the restart method `relora.restart`; with `reset`, the factors' moments are pruned."""
    method = restarts.parse(config.relora.restart)
    model = low_rank.give_masters(phase.model(state.trained, state.frozen), state.master)
    model = method.model(model, key=key(config, REINIT, state.update))
    master = low_rank.take_masters(model)
    _, trained, frozen = nnx.split(model, nnx.Param, low_rank.Frozen)
    opt_state = state.opt_state
    if reset:
        opt_state = method.opt_state(opt_state, key=key(config, PRUNE, state.update))
    return dataclasses.replace(state, trained=trained, frozen=frozen, opt_state=opt_state, master=master)


def train_step(
    config: Config, phase: Phase, state: TrainState, batch: Batch, learning_rate: Any
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state after one update, metrics): loss (mean nats per counted target), gradient norm, counters.

    If the loss or gradient norm is not finite, or there is no target, and so no loss, the update is skipped:
    counters advance; weights, moments and optimizer counts are unchanged.
    """
    loss, grads, targets = _gradients(config, phase, state, batch)
    with jax.named_scope("optimizer"):
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = phase.tx.update(
            grads, state.opt_state, state.trained, learning_rate=learning_rate
        )
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(state.trained, updates), opt_state),
            (state.trained, state.opt_state),
        )
    bad = (~good).astype(jnp.int32)
    streak = state.skipped_in_row  # frozen once it is long enough to stop the run, so that it is not missed
    streak = jnp.where(streak >= MAX_CONSECUTIVE_SKIPS, streak, (streak + 1) * bad)
    state = dataclasses.replace(
        state,
        update=state.update + 1,
        tokens_seen=_add_count(state.tokens_seen, targets),
        skipped=state.skipped + bad,
        skipped_in_row=streak,
        trained=trained,
        opt_state=opt_state,
    )
    metrics = {"loss": loss, "grad_norm": norm, "tokens_seen": state.tokens_seen + 0}
    if quiet := [jnp.all(g == 0, axis=(-2, -1)) for _, g in factors(grads)]:
        metrics["without_gradient"] = jnp.concatenate(quiet)
    return state, metrics | {"skipped": state.skipped + 0, "skipped_in_row": state.skipped_in_row + 0}


def factors(trained: Any) -> list[tuple[str, Any]]:
    """(path in the model, array [layers, m, n]) of each trained factor."""
    variables = [(path_text(path), value_of(leaf)) for path, leaf in leaves(trained)]
    return [(path, array) for path, array in variables if names.is_factor(path)]


def eval_step(model: Llama, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(summed nats, number) of the counted targets in rows [M, L+1], without dropout."""
    return model.loss(*batch)


def hidden_states(model: Llama, batch: Batch) -> jax.Array:
    """The residual stream after each block [layers, B, L, D] of rows [B, L+1]."""
    segment_ids = None if batch.segment_ids is None else batch.segment_ids[:, :-1]
    return model.hidden_states(batch.ids[:, :-1], segment_ids)


def _gradients(config: Config, phase: Phase, state: TrainState, batch: Batch) -> tuple[Any, Any, Any]:
    """(mean loss, gradient, number of targets), summed over microbatches and divided once by all targets.

    Without a target, the loss is NaN, since it has no mean, and the gradient 0.
    """
    dropout_key = key(config, DROPOUT, state.update)

    def summed_loss(trained: Any, index: Any, rows: Batch) -> tuple[Any, Any]:
        model = phase.model(trained, state.frozen)
        if config.relora.dropout and jax.tree.leaves(state.frozen):
            low_rank.with_dropout_keys(model, key=jax.random.fold_in(dropout_key, index))
        return eval_step(model, rows)

    def of_microbatch(index: Any, rows: Batch) -> tuple[Any, Any, Any]:
        (loss, targets), grads = jax.value_and_grad(summed_loss, has_aux=True)(state.trained, index, rows)
        return loss, targets, as_stored(grads)

    def accumulate(sums: Any, microbatch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, of_microbatch(*microbatch)), None

    zero_sums = (
        jnp.zeros((), jnp.promote_types(config.model.compute_dtype, jnp.float32)),
        jnp.zeros((), jnp.int32),
    )
    zeros = (*zero_sums, as_stored(jax.tree.map(jnp.zeros_like, state.trained)))
    microbatches = batch.ids.shape[0]
    if microbatches == 1:  # XLA would write the zeros, and add them
        loss, targets, grads = of_microbatch(0, jax.tree.map(lambda part: part[0], batch))
    else:
        (loss, targets, grads), _ = lax.scan(accumulate, zeros, (jnp.arange(microbatches), batch))
    count = jnp.maximum(targets, 1)
    return loss / targets, jax.tree.map(lambda g: g / count, grads), targets


def _optimizer(config: Config, params: Any) -> Any:
    settings = dataclasses.asdict(config.optimizer)
    del settings["peak_lr"], settings["warm_up_updates"], settings["min_lr_ratio"]
    relora = config.relora
    return optimizer.make_optimizer(
        params,
        prune=relora.prune,
        reset_count=relora.reset_count,
        factor_lr_ratio=relora.factor_lr_ratio,
        **settings,
    )


def _add_count(total: jax.Array, count: jax.Array) -> jax.Array:
    """`total`, as (low, high) 32-bit words, plus `count`: exact beyond 2^32 without 64-bit integers."""
    low = total[0] + count.astype(jnp.uint32)
    return jnp.stack([low, total[1] + (low < total[0]).astype(jnp.uint32)])
