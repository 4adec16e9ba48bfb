"""The method on a linear teacher: a single low-rank update is limited by its rank, restarts are not."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from relora_jax.core.low_rank import BaseKernel, LowRankDense, merge_and_reinit, wrap
from relora_jax.core.prune import zero
from relora_jax.core.reset import reset, with_reset
from relora_jax.core.schedule import multiplier
from relora_jax.training.optimizer import scale_by_rate

IN, OUT, RANK, ALPHA = 24, 20, 2, 6.0
CYCLE, CYCLES, PEAK_LR = 250, 4, 0.03


def orthogonal(rows: int, columns: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(rows, columns)))[0]


SINGULAR_VALUES = np.linspace(3.0, 1.0, 4 * RANK)
TEACHER = orthogonal(IN, 4 * RANK, 1) * SINGULAR_VALUES @ orthogonal(OUT, 4 * RANK, 2).T
OPTIMUM = float(np.sum(SINGULAR_VALUES[RANK:] ** 2))  # of rank r (Eckart and Young)


def loss(student: LowRankDense) -> jax.Array:
    """|W + delta - teacher|^2, the expected squared error for white inputs."""
    return jnp.sum((student(jnp.eye(IN)) - jnp.asarray(TEACHER, jnp.float32)) ** 2)


@cache
def trained(*, restarts: bool) -> tuple[float, list[np.ndarray]]:
    """(loss after the last update, summed update after each cycle)."""
    linear = nnx.Linear(IN, OUT, use_bias=False, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    student = wrap(linear, rank=RANK, alpha=ALPHA, targets=lambda path, layer: True, rngs=nnx.Rngs(1))
    graph, factors, frozen = nnx.split(student, nnx.LoRAParam, BaseKernel)
    tx = with_reset(optax.chain(optax.scale_by_adam(), scale_by_rate(-PEAK_LR)), prune=zero())

    @jax.jit
    def cycle(factors: Any, frozen: Any, opt_state: Any, rates: Any) -> Any:
        def update(carry: Any, rate: Any) -> Any:
            factors, opt_state = carry
            grads = jax.grad(lambda f: loss(nnx.merge(graph, f, frozen)))(factors)
            updates, opt_state = tx.update(grads, opt_state, factors, learning_rate=rate)
            return (optax.apply_updates(factors, updates), opt_state), None

        (factors, opt_state), _ = jax.lax.scan(update, (factors, opt_state), rates)
        student = nnx.merge(graph, factors, frozen)
        return factors, opt_state, loss(student), student.kernel[...] + student.delta()

    @jax.jit
    def restart(factors: Any, frozen: Any, opt_state: Any, key: Any) -> Any:
        student = merge_and_reinit(nnx.merge(graph, factors, frozen), key=key)
        return *nnx.split(student, nnx.LoRAParam, BaseKernel)[1:], reset(opt_state, key)

    opt_state, summed, end = tx.init(factors), [], 0.0
    for n in range(CYCLES):
        if n and restarts:
            factors, frozen, opt_state = restart(factors, frozen, opt_state, jax.random.key(n))
        dips = {"cycle": CYCLE, "restart_warm_up": 10} if restarts else {}
        phase = {"total": CYCLE * CYCLES, "warm_up": 10, "min_lr_ratio": 0.1} | dips
        rates = jnp.asarray([multiplier(s, **phase) for s in range(n * CYCLE, (n + 1) * CYCLE)])
        factors, opt_state, end, kernel = cycle(factors, frozen, opt_state, rates)
        summed.append(np.asarray(kernel, np.float64))
    return float(end), summed


def test_lora_reaches_the_best_rank_r_solution_and_relora_goes_below_it() -> None:
    lora, _ = trained(restarts=False)
    relora, _ = trained(restarts=True)
    assert OPTIMUM * (1 - 1e-5) <= lora <= 1.01 * OPTIMUM
    assert relora < 0.05 * OPTIMUM


def test_rank_of_summed_update_grows_by_r_each_cycle() -> None:
    _, summed = trained(restarts=True)
    for n, update in enumerate(summed, start=1):
        values = np.linalg.svd(update, compute_uv=False) / SINGULAR_VALUES[0]
        assert values[n * RANK - 1] > 1e-2 and values[n * RANK] < 1e-5, n


def test_without_restarts_the_rank_stays_r() -> None:
    _, summed = trained(restarts=False)
    for update in summed:
        assert np.linalg.matrix_rank(update, tol=1e-4) == RANK
