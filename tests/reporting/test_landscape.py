"""landscape: losses between and around two models, distances and similarities that are known beforehand."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.checkpoint.manager import Checkpoints
from relora_jax.checkpoint.variables import variables_of
from relora_jax.core.paths import leaves
from relora_jax.reporting import landscape
from relora_jax.training.evaluation import evaluate
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small

U = 6  # the low-rank phase begins at 4


def trained(arm: str, workdir: pathlib.Path, *, stop: int = U) -> tuple[Program, Any]:
    """The program and the last state of a run, which is also saved."""
    config = small.config(arm, relora__base_dtype="bfloat16")
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=stop)
    with Checkpoints(workdir, config) as checkpoints:
        checkpoints.save(stop, state)
        checkpoints.wait()
    return program, state


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, list[Any], list[float], list[Any]]:
    """(program, models of a low-rank and of a full-rank run, their own losses, the batches)."""
    program = landscape.full_rank_program(small.config(), small.mesh())
    rows = jax.tree.map(lambda part: part[0], small.batch(small.config(), program, 99))
    models, losses = [], []
    for arm in ("relora", "full"):
        workdir = tmp_path_factory.mktemp(arm)
        own, state = trained(arm, workdir)
        losses.append(evaluate(own, state, [rows]).loss)
        models.append(landscape.merged(variables_of(workdir, U), program))
    return program, models, losses, [rows]


def test_merged_model_has_the_loss_of_the_run(two: Any) -> None:
    program, models, losses, rows = two
    np.testing.assert_allclose([evaluate(program, model, rows).loss for model in models], losses, rtol=1e-6)


def test_line_begins_at_the_first_model_and_ends_at_the_second(two: Any) -> None:
    program, models, losses, rows = two
    line = dict(landscape.loss_between(program, *models, rows))
    np.testing.assert_allclose([line[0.0], line[1.0]], losses, rtol=1e-6)
    middle = jax.tree.map(lambda x, y: (x + y) / 2, *models)
    np.testing.assert_allclose(line[0.5], evaluate(program, middle, rows).loss, rtol=1e-6)
    around = dict(landscape.loss_around(program, models[1], jax.random.key(3), rows))
    np.testing.assert_allclose(around[0.0], losses[1], rtol=1e-6)


def test_direction_has_the_norm_of_the_weights_column_by_column(two: Any) -> None:
    _, (first, second), _, _ = two

    def drawn_for(model: Any, seed: int) -> dict[Any, Any]:
        return dict(leaves(landscape.direction(model, jax.random.key(seed)).trained))

    drawn = [drawn_for(model, 3) for model in (first, second)]
    for path, leaf in leaves(first.trained):
        step, weights = np.asarray(drawn[0][path][...]), np.asarray(leaf[...])
        if "norm" in leaf.axes:
            assert not step.any(), path
            continue
        axis = -1 if path[0] == "embed" else -2
        np.testing.assert_allclose(
            np.linalg.norm(step, axis=axis), np.linalg.norm(weights, axis=axis), rtol=1e-5
        )
        units = [np.asarray(of[path][...]) for of in drawn]
        units = [unit / np.linalg.norm(unit, axis=axis, keepdims=True) for unit in units]
        np.testing.assert_allclose(*units, atol=1e-5)  # the same draws for both
    other = drawn_for(first, 4)
    assert all(np.any(other[path][...] != leaf[...]) for path, leaf in drawn[0].items() if leaf[...].any())


def test_distance_is_relative_to_the_norm_of_the_weights(two: Any) -> None:
    _, (first, second), _, _ = two
    x, y = (
        np.concatenate([np.ravel(np.asarray(array, np.float64)) for array in flatten(model).values()])
        for model in (first, second)
    )
    expected = np.linalg.norm(x - y) / (np.linalg.norm(x) / 2 + np.linalg.norm(y) / 2)
    np.testing.assert_allclose(landscape.distance(first, second), expected, rtol=1e-5)


def test_barrier_is_above_the_line_between_the_losses() -> None:
    t = landscape.BETWEEN
    bump = np.where((t > 0) & (t < 1), 0.3, 0.0) + np.where(t < 0, 9.0, 0.0)
    line = [(float(a), float(b)) for a, b in zip(t, 2 + t + bump, strict=True)]
    np.testing.assert_allclose(landscape.barrier(line), 0.3, rtol=1e-9)
    assert landscape.barrier([(float(a), float(a**2)) for a in t]) == 0


def test_cka_is_that_of_the_definition_and_ignores_rotations() -> None:
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((n, 50, 6)).astype(np.float32) + 3 for n in (2, 3))
    rotation = np.linalg.qr(random.standard_normal((6, 6)))[0].astype(np.float32)
    np.testing.assert_allclose(np.diag(landscape.cka(x, 5 * x @ rotation)), 1, rtol=1e-4)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        center = np.eye(50) - 1 / 50
        a, b = a.astype(np.float64), b.astype(np.float64)
        return float(np.trace(a @ a.T @ center @ b @ b.T @ center))

    expected = [[hsic(a, b) / np.sqrt(hsic(a, a) * hsic(b, b)) for b in y] for a in x]
    np.testing.assert_allclose(landscape.cka(x, y), expected, rtol=1e-4)


def test_activations_are_those_that_the_head_sees(two: Any) -> None:
    program, (first, _), _, (rows,) = two
    activations = landscape.activations(program, first, [rows])
    model = program.phase.model(first.trained, first.frozen)
    ids, lengths = np.asarray(rows.ids)[:, :-1], np.asarray(rows.lengths)
    logits = np.asarray(model(jnp.asarray(ids)))[np.arange(ids.shape[1]) < lengths[:, None]]
    head = np.asarray(model.norm(jnp.asarray(activations[-1]))) @ np.asarray(model.head.kernel[...])
    assert len(activations) == 2 and len(head) == np.minimum(lengths, ids.shape[1]).sum()
    np.testing.assert_allclose(head, logits, atol=1e-5)


def test_activations_in_half_precision_are_compared_in_single(two: Any) -> None:
    _, (first, _), _, (rows,) = two
    config = small.config(model__compute_dtype="bfloat16")
    program = landscape.full_rank_program(config, small.mesh())
    activations = landscape.activations(program, first, [rows, rows])
    assert activations.dtype == np.float32
    assert activations.shape[1] == 2 * landscape.activations(program, first, [rows]).shape[1]


def test_losses_are_the_same_on_a_mesh_that_pads(tmp_path: pathlib.Path) -> None:
    config, lines = small.config("full", model__mlp=23), []
    own = Program(config, small.mesh())
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(0, own.init())
        checkpoints.wait()
    for mesh in (small.mesh(), small.mesh(tensor=2)):
        program = landscape.full_rank_program(config, mesh)
        model = landscape.merged(variables_of(tmp_path, 0), program)
        rows = jax.tree.map(lambda part: part[0], small.batch(config, program, 9))
        lines.append(list(landscape.loss_around(program, model, jax.random.key(3), [rows])))
    np.testing.assert_allclose(*lines, rtol=1e-5)
