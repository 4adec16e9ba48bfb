"""The decoder is causal, has the published shapes and equals the float64 reference, with any options."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from relora_jax import shapes
from relora_jax.config import ModelConfig
from relora_jax.data.batches import number_documents
from relora_jax.families import FAMILIES
from relora_jax.model import rope
from relora_jax.model.llama import Llama, positions_and_mask
from tests.support import oracle, small
from tests.support.small import VARIABLE_PATHS

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
    "590m": (594_489_600, 163_287_296),
}


def model(**changes: Any) -> ModelConfig:
    return dataclasses.replace(small.config().model, **changes)


def build(config: ModelConfig) -> Llama:
    return Llama(config, rngs=nnx.Rngs(0))


def with_moved_vectors(net: Llama) -> Llama:
    """The model with norms and biases as after training, neither 1 nor 0."""
    rng, state = np.random.default_rng(2), nnx.state(net)
    for path, value in nnx.to_flat_state(state):
        if path[-1] in ("scale", "bias"):
            value[...] = value[...] + rng.normal(0, 0.3, value.shape)
    nnx.update(net, state)
    return net


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_counts_by_shape_equal_the_counts_of_the_variables(tied: bool, family: str) -> None:
    changes = {"model__tied_embeddings": tied, "model__family": family, "model__head_dim": 6}
    run = small.config(**changes)
    state = nnx.eval_shape(lambda: build(run.model))
    total = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(state)))
    assert shapes.count(small.config("full", **changes)).full_rank_total == total
    from relora_jax.training.program import Program
    from relora_jax.training.state import flatten

    for restart in ("merge_and_reinit", "one_sided"):
        run.relora.restart = restart
        low = Program(run, small.mesh()).low_rank
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (low.trained, low.frozen)]
        assert sizes == [shapes.count(run).trained, shapes.count(run).frozen]
        factors = [value for path, value in flatten(low).items() if "trained" in path and "lora_" in path]
        assert sum(value.size for value in factors) == shapes.trained_factors(run)


def test_logits_do_not_depend_on_later_ids() -> None:
    net = build(model())
    embedded = net.embed(ids(1))
    graph, state = nnx.split(net)

    def at(x: Any, position: int) -> Any:
        net = nnx.merge(graph, state)
        net.embed = nnx.data(lambda _: x)  # pyright: ignore
        return net(ids(1))[0, position].sum()

    for position in (0, 5, 11):
        influence = np.abs(jax.grad(at)(embedded, position)[0]).sum(-1)
        assert np.all(influence[: position + 1] > 0) and not np.any(influence[position + 1 :])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_heads": 4},
        {"kv_heads": 1},
        {"tied_embeddings": True},
        {"head_dim": 6, "rope_theta": 500.0},
        {"head_dim": 16, "rope_scaling": "llama3(8, 1, 4, 100)"},  # unchanged, scaled and interpolated pairs
        {"rope_scaling": "linear(4)"},
        {"rope_scaling": "dynamic(2, 8)"},  # the rows have 12
        pytest.param({"rope_scaling": "dynamic(2, 12)"}, marks=pytest.mark.slow),
        pytest.param({"family": "mistral"}, marks=pytest.mark.slow),
        {"family": "qwen2"},
        {"family": "qwen3", "head_dim": 6, "tied_embeddings": True},
    ],
    ids=str,
)
def test_logits_and_loss_equal_the_oracle(changes: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        config = model(compute_dtype="float64", attention="einsum", **changes)
        net, text = with_moved_vectors(build(config)), ids(3, 13)
        flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(net))}
        params = {name: flat[path] for name, path in VARIABLE_PATHS.items() if path in flat}
        c, scaling = config, rope.parse(config.rope_scaling)
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
            scaling=(scaling.kind, dataclasses.astuple(scaling)),
        )
        np.testing.assert_allclose(
            net(text[:, :-1]), oracle.forward(twin, params, np.asarray(text)[:, :-1], 1.0), atol=1e-12
        )
        lengths = jnp.array([13, 1, 7], jnp.int32)
        nats, targets = net.loss(text, lengths)
        expected, count, _ = oracle.loss_and_grads(twin, params, np.asarray(text), np.asarray(lengths), 1.0)
        np.testing.assert_allclose(float(nats), expected, rtol=1e-12)
        assert int(targets) == count == 12 + 0 + 6


def rows_of_documents() -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """(ids [3, 13], true lengths, documents): 0 ends a document, and rows may split one.

    The second row starts with a lone 0; the third is padded.
    """
    text = np.random.default_rng(1).integers(1, 61, (3, 13)).astype(np.int32)
    text[0, [3, 4, 10]] = text[1, [0, 12]] = text[2, 5] = 0
    cuts = [(0, 0, 4), (0, 4, 5), (0, 5, 11), (0, 11, 13), (1, 0, 1), (1, 1, 13), (2, 0, 6), (2, 6, 9)]
    return text, np.array([13, 13, 9], np.int32), [text[row, a:b] for row, a, b in cuts]


def one_per_row(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """(ids, lengths) with each document in a separate row, padded with ids that must not count."""
    text = np.full((len(documents), 13), 7, np.int32)
    for row, document in zip(text, documents, strict=True):
        row[: len(document)] = document
    return text, np.array([len(document) for document in documents], np.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"kv_heads": 1}, marks=pytest.mark.slow),
        pytest.param({"kv_heads": 4, "remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"family": "qwen2", "kv_heads": 1}, marks=pytest.mark.slow),
        {"family": "qwen3", "head_dim": 6, "remat": "dots"},
    ],
    ids=str,
)
def test_separate_documents_equal_the_oracle_of_each_one_alone(changes: dict[str, Any]) -> None:
    with jax.enable_x64(True):
        c = model(compute_dtype="float64", attention="einsum", **changes)
        graph, state = nnx.split(with_moved_vectors(build(c)))
        flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(state)}
        params = {name: flat[path] for name, path in VARIABLE_PATHS.items() if path in flat}
        shape = (c.vocab_size, c.hidden, c.mlp, c.layers, c.heads, c.kv_heads, c.head_dim, c.rope_theta)
        text, lengths, documents = rows_of_documents()
        expected, count, theirs = oracle.loss_and_grads(
            oracle.Model(*shape), params, *one_per_row(documents), 1.0
        )
        numbers = number_documents(text, 0)

        def loss(state: Any) -> Any:
            return nnx.merge(graph, state).loss(*map(jnp.asarray, (text, lengths, numbers)))

        (nats, targets), grads = jax.value_and_grad(loss, has_aux=True)(state)
        np.testing.assert_allclose(float(nats), expected, rtol=1e-12)
        assert int(targets) == count == sum(len(document) - 1 for document in documents)
        flat = {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(grads)}
        for name, value in theirs.items():
            np.testing.assert_allclose(flat[VARIABLE_PATHS[name]], value, rtol=1e-9, atol=1e-12, err_msg=name)


def test_positions_restart_and_attention_stays_within_each_document() -> None:
    # checked directly: rotary positions are relative, so logits do not reveal a shifted document
    numbers = jnp.array([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 1]])
    positions, mask = positions_and_mask(numbers)
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 4]]
    for row, row_mask in zip(numbers.tolist(), mask.tolist(), strict=True):
        assert row_mask == [[key == query for key in row] for query in row]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"attention": "xla"}, marks=pytest.mark.slow),
        {"attention": "xla", "remat": "dots", "kv_heads": 1},
    ],
    ids=str,
)
def test_separate_documents_have_the_loss_and_gradients_of_each_one_alone(changes: dict[str, Any]) -> None:
    graph, state = nnx.split(build(model(**changes)))

    def loss_and_grads(text: np.ndarray, lengths: np.ndarray, *numbers: np.ndarray) -> Any:
        def loss(state: Any) -> Any:
            return nnx.merge(graph, state).loss(text, lengths, *numbers)

        text, lengths, *numbers = map(jnp.asarray, (text, lengths, *numbers))
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(state)

    text, lengths, documents = rows_of_documents()
    (nats, targets), grads = loss_and_grads(text, lengths, number_documents(text, 0))
    (expected, count), theirs = loss_and_grads(*one_per_row(documents))
    np.testing.assert_allclose(float(nats), float(expected), rtol=1e-6)
    assert int(targets) == int(count)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(theirs), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(b)


@pytest.mark.parametrize("changes", [{"attention": "xla"}, {"remat": "dots"}, {"remat": "full"}], ids=str)
def test_run_options_do_not_change_loss_or_gradients(changes: dict[str, Any]) -> None:
    def loss_and_grads(config: ModelConfig) -> Any:
        graph, state = nnx.split(build(config))
        text, lengths = ids(2, 13), jnp.array([13, 13], jnp.int32)
        loss = lambda s: nnx.merge(graph, s).loss(text, lengths)[0]  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(state)

    plain, grads = loss_and_grads(model(attention="einsum"))
    other, others = loss_and_grads(model(**({"attention": "einsum"} | changes)))
    np.testing.assert_allclose(plain, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(others), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_bfloat16_computes_in_bfloat16_with_float32_variables_and_logits() -> None:
    net = build(model(compute_dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(net))} == {jnp.dtype("float32")}
    logits = net(ids())
    assert logits.dtype == jnp.float32 and net.blocks.mlp.gate.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, build(model())(ids()), atol=0.01)


def test_gradient_of_a_repeated_id_is_summed_in_float32() -> None:
    graph, state = nnx.split(build(model(compute_dtype="bfloat16")).embed)
    total = lambda state: jnp.sum(nnx.merge(graph, state)(jnp.full((8, 512), 5)).astype(jnp.float32))  # noqa: E731
    gradient = jax.grad(total)(state)["embedding"][...]
    np.testing.assert_array_equal(
        gradient, 4096 * (np.arange(61) == 5)[:, None] * np.ones(16)
    )  # 256 in bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_are_initialized_normal_with_init_std_norms_to_one_and_biases_to_zero(family: str) -> None:
    net = build(model(hidden=64, mlp=96, vocab_size=500, head_dim=16, family=family))
    for path, value in nnx.to_flat_state(nnx.state(net)):
        array = np.asarray(value[...])
        if path[-1] in ("scale", "bias"):
            assert np.all(array == (path[-1] == "scale"))
        else:
            assert abs(array.std() / 0.02 - 1) < 0.1 and abs(array.mean()) < 2e-3, path
    layers = np.asarray(net.blocks.attention.q.kernel[...])
    assert not np.array_equal(layers[0], layers[1])


@pytest.mark.parametrize(
    ("cpus", "remat", "layers", "loops"),
    [
        (1, "none", 2, 0),
        (1, "none", 9, 1),  # compile time does not grow further
        (1, "full", 2, 1),  # without a loop, XLA keeps what it should compute again
        (2, "none", 2, 1),  # and gathers all layers' kernels at once
        (0, "none", 2, 1),
    ],
)
def test_layers_are_unrolled_on_one_cpu_without_rematerialization(
    cpus: int, remat: str, layers: int, loops: int
) -> None:
    net = build(model(remat=remat, layers=layers))
    mesh = jax.sharding.use_abstract_mesh(small.mesh(fsdp=cpus).abstract_mesh) if cpus else nullcontext()
    with mesh:
        text = jax.jit(lambda ids: net(ids)).lower(ids()).as_text()
    assert text.count("stablehlo.while") == loops
