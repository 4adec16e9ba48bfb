"""Properties of an update, of the start of the low-rank phase and of a restart."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.config import MAX_CONSECUTIVE_SKIPS, Config
from relora_jax.core import prune
from relora_jax.data.batches import Batch, number_documents
from relora_jax.training import steps
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import small

MESHES = [(1, 4, 1), (4, 1, 1), (2, 2, 1), (1, 2, 2)]  # 61 pieces are padded for tensor = 2


@pytest.fixture(scope="module")
def plain() -> tuple[Config, Program, Any]:
    """A program on one device and the state at u = 7, in the low-rank phase."""
    config = small.config()
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=7)
    return config, program, state


def copied(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def logits(program: Program, state: Any) -> np.ndarray:
    phase = program.low_phase if jax.tree.leaves(state.frozen) else program.phase
    ids = jnp.arange(24).reshape(2, 12) % program.config.model.vocab_size
    return np.asarray(phase.model(state.trained, state.frozen)(ids))


def same(a: Any, b: Any) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


def test_due_work_runs_inside_the_context_and_an_update_without_it_does_not_enter_it(plain: Any) -> None:
    _, program, state = plain
    inside: list[Any] = []

    @contextlib.contextmanager
    def context(update: Any) -> Iterator[None]:
        inside.append(int(update))
        yield
        inside.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(donated.trained)))

    donated = copied(state)
    assert program.begin_update(7, donated, context=context) == (donated, steps.Due()) and not inside
    _, due = program.begin_update(8, donated, context=context)
    assert due == steps.Due(merge=True, reset=True) and inside == [7, True]


@pytest.fixture(scope="module")
def runs_on_devices() -> dict[Any, Any]:
    """(config, program, state, losses) of whole runs, by prune and mesh; filled by the test below."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("choice", [prune.magnitude(0.9), prune.random(0.5)], ids=str)
def test_devices_share_a_run_without_changing_it(
    shape: tuple[int, int, int], choice: prune.Prune, runs_on_devices: dict[Any, Any]
) -> None:
    config = small.config(relora__prune=choice, relora__merges_per_cycle=2)
    for mesh in ((1, 1, 1), shape):
        if (choice, mesh) not in runs_on_devices:
            program = Program(config, small.mesh(*mesh))
            runs_on_devices[choice, mesh] = (config, program, *small.run(config, program))
    _, _, one, losses_of_one = runs_on_devices[choice, (1, 1, 1)]
    _, program, many, losses = runs_on_devices[choice, shape]
    many = program.saved(many)
    np.testing.assert_allclose(losses, losses_of_one, rtol=1e-5)
    weights = {k: v for k, v in flatten(one).items() if k.startswith(("trained/", "frozen/"))}
    for path, value in weights.items():
        other = np.asarray(flatten(many)[path])
        assert np.linalg.norm(other - value) <= 1e-5 * np.linalg.norm(value), path
    kernel = flatten(many)["frozen/blocks/mlp/gate/kernel"]
    shard = kernel.addressable_shards[0].data
    assert (len(kernel.sharding.device_set), shard.size * shape[1] * shape[2]) == (4, kernel.size)


@pytest.mark.slow
def test_train_step_compiles_once_per_phase(runs_on_devices: dict[Any, Any]) -> None:
    if not runs_on_devices:  # this test alone
        config = small.config(relora__merges_per_cycle=2)
        program = Program(config, small.mesh(2, 2))
        runs_on_devices["alone"] = (config, program, *small.run(config, program))
    for _, program, _, _ in runs_on_devices.values():
        assert [program._update(low=low)[1]._cache_size() for low in (False, True)] == [1, 1]
        assert program._restart._cache_size() == 2  # with and without a reset


def test_start_of_the_low_rank_phase_leaves_logits_and_the_rest_unchanged() -> None:
    config = small.config()
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=4)
    before, old = logits(program, state), {k: np.asarray(v) for k, v in flatten(state).items()}
    state = program.start_low_rank(state)
    np.testing.assert_allclose(logits(program, state), before, atol=1e-6)
    new = flatten(state)
    for path, value in new.items():
        if "lora" in path:
            assert ("trained/" in path and "lora_a" in path) or not np.any(value), path
        elif path.startswith("frozen/"):
            assert same(value, old[path.replace("frozen/", "trained/")]), path
        elif "inner_states/factors" in path:
            assert same(value, 0), path
        else:
            assert same(value, old[path]), path
    assert not [path for path in new if ("/mu/" in path or "/nu/" in path) and path.endswith("mlp/up/kernel")]
    assert [int(v) for path, v in new.items() if "inner_states/rest" in path and path.endswith("count")] == [
        4
    ]


@pytest.mark.parametrize("reset", [True, False])
def test_restart_leaves_logits_unchanged_and_changes_only_factors_kernels_and_their_moments(
    plain: tuple[Config, Program, Any], reset: bool
) -> None:
    _, program, state = plain
    before, old = logits(program, state), {k: np.asarray(v) for k, v in flatten(state).items()}
    state = program.restart(copied(state), reset=reset)
    np.testing.assert_allclose(logits(program, state), before, rtol=0, atol=2e-6)
    for path, value in flatten(state).items():
        is_moment, is_factor = "/mu/" in path or "/nu/" in path, "lora_" in path
        if path.startswith("trained/") and is_factor:
            assert not same(value, old[path]) and (np.any(value) == path.endswith("lora_a")), path
        elif path.startswith("frozen/"):
            assert not same(value, old[path]), path
        elif is_moment and is_factor and reset:
            assert np.any(old[path]) and not np.any(value), path
        else:
            assert same(value, old[path]), path


def test_restarts_draw_different_factors_for_each_update_kernel_and_layer(
    plain: tuple[Config, Program, Any],
) -> None:
    config, program, state = plain
    again = dataclasses.replace(copied(state), update=jnp.array(11, jnp.int32))
    draws = [flatten(program.restart(s, reset=True)) for s in (copied(state), copied(state), again)]
    first, repeated, later = ({k: np.asarray(v) for k, v in d.items() if k.endswith("lora_a")} for d in draws)
    assert all(same(first[k], repeated[k]) for k in first if k.startswith("trained"))
    rows = [
        layer.tobytes()
        for d in (first, later)
        for k, v in d.items()
        if k.startswith("trained")
        for layer in v
    ]
    assert len(set(rows)) == len(rows) == 2 * 7 * config.model.layers


@pytest.mark.parametrize("reason", ["not finite", "no target"])
def test_skipped_update_changes_only_counters(plain: tuple[Config, Program, Any], reason: str) -> None:
    config, program, state = plain
    batch = small.batch(config, program, 7)
    if reason == "no target":
        batch = batch._replace(lengths=jnp.zeros_like(batch.lengths))
    else:
        bad = jax.tree.map(lambda v: v.at[0].set(jnp.nan), state.trained["norm"])
        state = dataclasses.replace(state, trained=copied(state.trained))
        state.trained["norm"] = bad
    old = {k: np.asarray(v) for k, v in flatten(state).items()}
    after, values = program.train_step(copied(state), batch, 1e-2)
    targets = int(np.clip(np.asarray(batch.lengths) - 1, 0, None).sum())
    for path, value in flatten(after).items():
        moved = {"update": 1, "skipped": 1, "skipped_in_row": 1}.get(path, 0)
        expected = old[path] + [targets, 0] if path == "tokens_seen" else old[path] + moved
        np.testing.assert_array_equal(np.asarray(value), expected.astype(old[path].dtype), err_msg=path)
    assert int(values["skipped"]) == 1
    assert np.isnan(values["loss"])  # also without a target: there is nothing to take the mean of, not 0


def test_good_update_resets_skips_in_a_row(plain: tuple[Config, Program, Any]) -> None:
    config, program, state = plain
    state = dataclasses.replace(copied(state), skipped_in_row=jnp.array(5, jnp.int32))
    _, values = program.train_step(state, small.batch(config, program, 7), 1e-2)
    assert (int(values["skipped_in_row"]), int(values["skipped"])) == (0, 0)


def test_skips_in_a_row_that_stop_a_run_are_not_reset(plain: tuple[Config, Program, Any]) -> None:
    config, program, state = plain
    state = dataclasses.replace(copied(state), skipped_in_row=jnp.array(MAX_CONSECUTIVE_SKIPS, jnp.int32))
    _, values = program.train_step(state, small.batch(config, program, 7), 1e-2)
    assert int(values["skipped_in_row"]) == MAX_CONSECUTIVE_SKIPS


def test_tokens_seen_is_exact_beyond_32_bits(plain: tuple[Config, Program, Any]) -> None:
    config, program, state = plain
    state = dataclasses.replace(copied(state), tokens_seen=jnp.array([2**32 - 1, 3], jnp.uint32))
    batch = small.batch(config, program, 7)
    _, values = program.train_step(state, batch, 1e-2)
    low, high = (int(word) for word in values["tokens_seen"])
    assert low + (high << 32) == (3 << 32) + 2**32 - 1 + int((np.asarray(batch.lengths) - 1).sum())


def test_accumulation_does_not_change_an_update(plain: tuple[Config, Program, Any]) -> None:
    config, program, state = plain
    whole = small.config(train__microbatch=8)
    batch = small.batch(config, program, 7)
    joined = jax.tree.map(lambda x: x.reshape(1, 8, *x.shape[2:]), batch)
    one, first = program.train_step(copied(state), batch, 1e-2)
    other, second = Program(whole, small.mesh()).train_step(copied(state), joined, 1e-2)
    np.testing.assert_allclose(float(first["loss"]), float(second["loss"]), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(one.trained), jax.tree.leaves(other.trained), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.slow
def test_separate_documents_train_like_each_one_alone_on_any_microbatches_and_devices(
    plain: tuple[Config, Program, Any],
) -> None:
    config, program, state = plain
    ids, lengths = small.rows(config, 7)
    ids[ids % 5 == 0] = 0  # 0 ends a document
    numbers = number_documents(ids, 0)
    packed = [
        np.concatenate([part, np.zeros((3, *part.shape[1:]), np.int32)]) for part in (ids, lengths, numbers)
    ]
    unpacked = [np.zeros_like(part) for part in packed]  # one document per row, same shape: compiled once
    documents = [
        row[:length][number[:length] == n]
        for row, length, number in zip(*(part.reshape(20, *part.shape[2:]) for part in packed), strict=True)
        for n in range(number[length - 1] + 1)
        if length
    ]
    assert 16 <= len(documents) <= 20
    for n, document in enumerate(documents):  # distributed over the microbatches round-robin
        unpacked[0][n % 5, n // 5, : len(document)] = document
        unpacked[1][n % 5, n // 5] = len(document)
    one, values = program.train_step(copied(state), Batch(*map(jnp.asarray, packed)), 1e-2)
    _, expected = program.train_step(copied(state), Batch(*map(jnp.asarray, unpacked)), 1e-2)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(float(values[name]), float(expected[name]), rtol=1e-6, err_msg=name)
    assert same(values["tokens_seen"], expected["tokens_seen"])

    shared = Program(config, small.mesh(2, 2))
    state = jax.device_put(copied(state), jax.tree.map(lambda leaf: leaf.sharding, shared.low_rank))
    batch = Batch(*(jax.device_put(part, shared.rows) for part in packed))
    many, others = shared.train_step(state, batch, 1e-2)
    assert len(many.frozen["blocks"]["mlp"]["up"]["kernel"].sharding.device_set) == 4
    np.testing.assert_allclose(float(others["loss"]), float(values["loss"]), rtol=1e-5)
    for a, b in zip(jax.tree.leaves(many.trained), jax.tree.leaves(one.trained), strict=True):
        assert np.linalg.norm(np.asarray(a) - np.asarray(b)) <= 1e-5 * np.linalg.norm(b)


def test_base_kernels_change_only_by_merges(plain: tuple[Config, Program, Any]) -> None:
    config, program, state = plain
    old = {k: np.asarray(v) for k, v in flatten(state).items() if k.startswith("frozen/")}
    after, _ = small.run(config, program, state=copied(state), start=7, stop=8)
    assert all(same(v, old[k]) for k, v in flatten(after).items() if k in old) and len(old) == 7


def test_zero_base_gives_every_factor_a_gradient_from_the_first_update() -> None:
    config = small.config(relora__warm_start_updates=0, relora__base_init="zero", relora__warm_up_updates=0)
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=1)
    factors = {k: np.asarray(v) for k, v in flatten(state).items() if "/mu/" in k and "lora_" in k}
    assert len(factors) == 14
    assert all(np.any(layer) for value in factors.values() for layer in value)


@pytest.mark.slow
def test_dropout_changes_with_update_and_seed_and_is_off_in_evaluation() -> None:
    config = small.config("lora", relora__dropout=0.4, relora__warm_up_updates=0)
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=1)
    batch = small.batch(config, program, 7)
    losses = []
    for u in (7, 7, 8):
        moved = dataclasses.replace(copied(state), update=jnp.array(u, jnp.int32))
        losses.append(float(program.train_step(moved, batch, 1e-2)[1]["loss"]))
    assert losses[0] == losses[1] != losses[2]
    flat = batch._replace(ids=batch.ids[0], lengths=batch.lengths[0])
    assert float(program.eval_step(state, flat)[0]) == float(program.eval_step(state, flat)[0])


def test_finite_loss_with_a_non_finite_gradient_is_skipped(
    plain: tuple[Config, Program, Any],
) -> None:
    config, program, _ = plain
    state = program.init()
    huge = jax.tree.map(lambda v: jnp.full_like(v, 1e30), state.trained["norm"]["scale"])
    state.trained["norm"]["scale"] = huge
    state.trained["head"] = jax.tree.map(jnp.zeros_like, state.trained["head"])  # so the logits are 0
    _, values = program.train_step(state, small.batch(config, program, 0), 1e-2)
    assert np.isfinite(float(values["loss"])) and not np.isfinite(float(values["grad_norm"]))
    assert int(values["skipped"]) == 1


@pytest.mark.slow
def test_microbatches_of_an_update_draw_different_dropout_masks() -> None:
    config = small.config("lora", relora__dropout=0.4, relora__warm_up_updates=0)
    program = Program(config, small.mesh())
    state, _ = small.run(config, program, stop=1)
    one = jax.tree.map(lambda part: part[:1], small.batch(config, program, 7))
    twice = jax.tree.map(lambda part: jnp.concatenate([part, part]), one)
    losses = [float(program.train_step(copied(state), batch, 1e-2)[1]["loss"]) for batch in (one, twice)]
    assert losses[0] != losses[1]


def test_keys_differ_by_seed_purpose_and_update() -> None:
    configs = [small.config(train__seed=seed) for seed in (0, 1)]
    keys = [steps.key(c, purpose, u) for c in configs for purpose in range(5) for u in (0, 1, 7)]
    assert len({jax.random.key_data(key).tobytes() for key in keys}) == len(keys) == 30


def test_restarts_done_counts_resets() -> None:
    for arm in ("relora", "full", "lora", "lora_warm"):
        config = small.config(arm)
        for u in range(17):
            assert steps.restarts_done(config, u) == sum(steps.due(config, v).reset for v in range(u))


def test_steps_that_return_a_state_donate_their_input(plain: tuple[Config, Program, Any]) -> None:
    config, program, state = plain
    first = copied(state)
    second = program.restart(first, reset=True)
    third, _ = program.train_step(second, small.batch(config, program, 7), 1e-2)
    kernels = [s.frozen["blocks"]["mlp"]["up"]["kernel"][...] for s in (first, second, third)]
    assert [kernel.is_deleted() for kernel in kernels] == [True, True, False]


def test_rate_dips_at_restarts_only_in_relora() -> None:
    rates = {
        arm: [steps.learning_rate(small.config(arm), u) for u in range(16)]
        for arm in ("full", "lora_warm", "relora")
    }
    assert rates["relora"][:4] == rates["lora_warm"][:4] == rates["full"][:4]
    assert [u for u, value in enumerate(rates["relora"]) if value == 0] == [0, 4, 8, 12]
    assert [u for u, value in enumerate(rates["lora_warm"]) if value == 0] == [0, 4]
    assert [u for u, value in enumerate(rates["full"]) if value == 0] == [0]
    ablation = small.config(relora__jagged=False)
    assert [steps.learning_rate(ablation, u) for u in range(16)] == rates["lora_warm"]


def test_restarts_are_due_at_the_start_of_an_update_and_never_at_the_end_of_a_run() -> None:
    config = small.config(relora__merges_per_cycle=2)
    due = {u: steps.due(config, u) for u in range(16)}
    assert [u for u in due if due[u].start_low_rank] == [4]
    assert [u for u in due if due[u].merge] == [6, 8, 10, 12, 14]
    assert [u for u in due if due[u].reset] == [8, 12]
    for arm, start in (("full", []), ("control", []), ("lora", [0]), ("lora_warm", [4])):
        due = {u: steps.due(small.config(arm), u) for u in range(17)}
        assert [u for u in due if any(due[u])] == start == [u for u in due if due[u].start_low_rank], arm


def test_variables_and_moments_are_float32_with_bfloat16_compute() -> None:
    config = small.config(model__compute_dtype="bfloat16", relora__base_dtype="bfloat16")
    low = Program(config, small.mesh()).low_rank
    kinds = {path: leaf.dtype for path, leaf in flatten(low).items()}
    wide = {path for path in kinds if path.startswith("trained/") or "/mu/" in path or "/nu/" in path}
    assert len(wide) > 40 and {kinds[path] for path in wide} == {jnp.dtype("float32")}
    assert {kinds[path] for path in kinds if path.startswith("frozen/")} == {jnp.dtype("bfloat16")}
