"""The decoder: causal, of the published shapes, equal to the float64 re-enactment, whatever its options."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax import shapes
from relora_jax.config import ModelConfig
from relora_jax.model import Llama, token_loss
from tests import oracle, small
from tests.test_oracle import PLACES

#        total         trainable at r = 128, vocabulary 32,100 (the published configurations)
TABLE = {
    "9m": (9_021_568, 9_480_320),
    "20m": (19_599_616, 18_936_064),
    "35m": (35_274_624, 30_261_120),
    "40m": (42_475_680, 34_545_824),
    "60m": (58_176_000, 42_873_344),
    "71m": (70_681_088, 47_837_696),
    "100m": (100_117_120, 59_787_904),
    "130m": (134_259_456, 71_738_112),
    "250m": (247_524_096, 98_888_448),
    "350m": (368_174_080, 125_608_960),
    "1b": (1_339_492_352, 251_116_544),
    "3b": (2_686_343_680, 364_009_984),
    "7b": (6_739_234_816, 583_045_120),
}


def model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(small.config().model, **changes)


def made(config: ModelConfig) -> Llama:
    return Llama(config, rngs=nnx.Rngs(0))


def ids(rows: int = 2, length: int = 12) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 61, (rows, length)).astype(np.int32))


def test_all_published_shapes_have_the_published_counts() -> None:
    assert shapes.SHAPES.keys() == TABLE.keys()
    for name, (total, trainable) in TABLE.items():
        run = small.config(model__vocab_size=1, relora__rank=128)
        run.model = shapes.llama(name, compute_dtype="float32")
        count = shapes.count(run)
        assert (count.full_rank_total, count.trained) == (total, trainable), name
        assert count.trained + count.frozen - total == trainable - (total - count.frozen)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_by_shape_are_the_counts_of_the_variables(tied: bool) -> None:
    run = small.config(model__tied_embeddings=tied)
    state = nnx.eval_shape(lambda: made(run.model))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(state)))
    assert shapes.count(small.config("full", model__tied_embeddings=tied)).full_rank_total == total
    from relora_jax.program import Program

    low = Program(run, small.mesh()).low_rank
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (low.trained, low.frozen)]
    assert sizes == [shapes.count(run).trained, shapes.count(run).frozen]


def test_no_logit_sees_the_future() -> None:
    net = made(model())
    embedded = net.embed(ids(1))
    graph, state = nnx.split(net)

    def at(x: Any, position: int) -> Any:
        net = nnx.merge(graph, state)
        net.embed = nnx.data(lambda _: x)  # pyright: ignore
        return net(ids(1))[0, position].sum()

    for position in (0, 5, 11):
        seen = np.abs(jax.grad(at)(embedded, position)[0]).sum(-1)
        assert np.all(seen[: position + 1] > 0) and not np.any(seen[position + 1 :])


@pytest.mark.parametrize(
    "changes",
    [{}, {"kv_heads": 4}, {"kv_heads": 1}, {"tied_embeddings": True}, {"head_dim": 6, "rope_theta": 500.0}],
    ids=str,
)
def test_logits_and_loss_equal_the_oracle(changes: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        config = model(compute_dtype="float64", attention="einsum", **changes)
        net, text = made(config), ids(3, 13)
        flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(net))}
        params = {name: flat[place] for name, place in PLACES.items() if place in flat}
        c = config
        twin = oracle.Model(
            c.vocab_size,
            c.hidden,
            c.mlp,
            c.layers,
            c.heads,
            c.kv_heads,
            c.head_dim,
            c.rope_theta,
            tied=c.tied_embeddings,
        )
        np.testing.assert_allclose(
            net(text[:, :-1]), oracle.forward(twin, params, np.asarray(text)[:, :-1], 1.0), atol=1e-12
        )
        lengths = jnp.array([13, 1, 7], jnp.int32)
        nats, targets = token_loss(net(text[:, :-1]), text, lengths)
        expected, count, _ = oracle.loss_and_grads(twin, params, np.asarray(text), np.asarray(lengths), 1.0)
        np.testing.assert_allclose(float(nats), expected, rtol=1e-12)
        assert int(targets) == count == 12 + 0 + 6


@pytest.mark.parametrize("changes", [{"attention": "xla"}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_options_of_the_run_do_not_change_loss_or_gradients(changes: dict[str, Any]) -> None:
    def loss_and_grads(config: ModelConfig) -> Any:
        graph, state = nnx.split(made(config))
        text, lengths = ids(2, 13), jnp.array([13, 13], jnp.int32)
        loss = lambda s: token_loss(nnx.merge(graph, s)(text[:, :-1]), text, lengths)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(state)

    plain, grads = loss_and_grads(model(attention="einsum"))
    other, others = loss_and_grads(model(**({"attention": "einsum"} | changes)))
    np.testing.assert_allclose(plain, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_bfloat16_computes_in_bfloat16_with_float32_variables_and_logits() -> None:
    net = made(model(compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(net))} == {jnp.dtype("float32")}
    logits = net(ids())
    assert logits.dtype == jnp.float32 and net.blocks.mlp.gate.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, made(model())(ids()), atol=0.01)


def test_matrices_start_normal_with_the_configured_deviation_and_norms_at_one() -> None:
    net = made(model(hidden=64, mlp=96, vocab_size=500, head_dim=16))
    for path, value in nnx.to_flat_state(nnx.state(net)):
        array = np.asarray(value[...])
        if path[-1] == "scale":
            assert np.all(array == 1)
        else:
            assert abs(array.std() / 0.02 - 1) < 0.1 and abs(array.mean()) < 2e-3, path
    layers = np.asarray(net.blocks.attention.q.kernel[...])
    assert not np.array_equal(layers[0], layers[1])
