"""Each optimizer treats the kernels of the blocks layer by layer, as its paper does in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relora_jax.core.paths import leaves, value_of
from relora_jax.errors import UserError
from relora_jax.training import optimizers
from relora_jax.training.optimizer import make_optimizer
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from relora_jax.validate import validate
from tests.support import small

B1, B2, EPS, RATE = 0.8, 0.95, 1e-6, 0.1
NAMES = ("adamw", "muon", "galore(3, 9)", "scale")
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")


def updates_of(name: str, steps: int = 5, **model: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """({path: change} of the last update, {path: gradient} of each) of the small model in float64."""
    config = small.config("full", **{f"model__{key}": value for key, value in model.items()})
    program = Program(config, small.mesh())
    params = program.init().trained
    options: dict[str, Any] = {"b1": B1, "b2": B2, "eps": EPS, "weight_decay": 0.0, "clip_norm": 0.0}
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
    tx = make_optimizer(params, name=name, **options)
    state, update, rng, history, changes = (
        tx.init(params),
        jax.jit(tx.update),
        np.random.default_rng(0),
        [],
        None,
    )
    for _ in range(steps):
        grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), params)
        changes, state = update(grads, state, params, learning_rate=RATE)
        history.append(by_path(grads))
    return by_path(changes), history


def by_path(tree: Any) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(value_of(leaf)) for path, leaf in leaves(tree)}


def adam(grads: list[np.ndarray]) -> np.ndarray:
    """Adam's scaling of the last of the gradients."""
    m, v = np.zeros_like(grads[0]), np.zeros_like(grads[0])
    for g in grads:
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g * g
    t = len(grads)
    return m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + EPS)


def muon(grads: list[np.ndarray]) -> np.ndarray:
    """Muon's (Nesterov, five Newton-Schulz steps) for one matrix, at 0.2 times the longer side's root."""
    beta, m = 0.95, np.zeros_like(grads[0])
    for g in grads:
        m = beta * m + (1 - beta) * g
    t = len(grads)
    x = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * grads[-1] / (1 - beta**t)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return 0.2 * np.sqrt(max(x.shape)) * (x.T if tall else x)


def galore(grads: list[np.ndarray], rank: int = 3) -> np.ndarray:
    """GaLore's for one matrix: Adam of the gradient in its leading singular vectors, times 0.25."""
    left = grads[0].shape[0] >= grads[0].shape[1]
    basis = leading(grads[0], rank)
    low = adam([basis.T @ g if left else g @ basis for g in grads])
    return 0.25 * (basis @ low if left else low @ basis.T)


def leading(g: np.ndarray, rank: int) -> np.ndarray:
    """The leading singular vectors of the longer side."""
    u, _, vt = np.linalg.svd(g, full_matrices=False)
    return u[:, :rank] if g.shape[0] >= g.shape[1] else vt[:rank].T


def columns(grads: list[np.ndarray]) -> np.ndarray:
    """Each column divided by its RMS."""
    g = grads[-1]
    return g / np.sqrt(np.mean(g * g, axis=0, keepdims=True))


def columns_of_momentum(grads: list[np.ndarray]) -> np.ndarray:
    m = np.zeros_like(grads[0])
    for g in grads:
        m = 0.9 * m + 0.1 * g
    return columns([m])


OF_KERNELS = {"adamw": adam, "muon": muon, "galore(3, 9)": galore, "scale": columns}


@pytest.mark.parametrize("name", NAMES)
def test_updates_of_each_layer_are_those_of_the_paper(name: str) -> None:
    with jax.enable_x64(True):
        changes, history = updates_of(name)
    others = {"embed/embedding": adam, "head/kernel": adam}
    if name == "scale":
        others = {"embed/embedding": columns, "head/kernel": columns_of_momentum}
    seen = 0
    for path, change in changes.items():
        grads = [grads[path] for grads in history]
        if path.split("/")[-2] in KERNELS:
            seen += 1
            for n, of_layer in enumerate(change):
                expected = OF_KERNELS[name]([g[n] for g in grads])
                np.testing.assert_allclose(of_layer, -RATE * expected, rtol=1e-5, atol=1e-7, err_msg=path)
        else:
            expected = others.get(path, adam)(grads)
            np.testing.assert_allclose(change, -RATE * expected, rtol=1e-5, atol=1e-7, err_msg=path)
    assert seen == 7 and len(changes) == 12


def test_galore_seeks_its_subspace_again() -> None:
    """The old moments then count in the new one, where the signs of its vectors are arbitrary."""
    with jax.enable_x64(True):
        changes, history = updates_of("galore(3, 2)", steps=5)
    for layer in range(2):
        change, g = changes["blocks/mlp/down/kernel"][layer], history[4]["blocks/mlp/down/kernel"][layer]
        basis = leading(g, 3)  # of update 4: the last multiple of 2
        assert np.linalg.matrix_rank(change) == 3
        np.testing.assert_allclose(basis @ (basis.T @ change), change, atol=1e-6)


def test_scale_takes_a_tied_embedding_as_the_head() -> None:
    with jax.enable_x64(True):
        changes, history = updates_of("scale", tied_embeddings=True)
    expected = columns_of_momentum([grads["embed/embedding"] for grads in history])
    np.testing.assert_allclose(changes["embed/embedding"], -RATE * expected, rtol=1e-6)


def test_biases_and_head_norms_are_left_to_adam() -> None:
    with jax.enable_x64(True):
        changes, history = updates_of("muon", family="qwen2")
    for path in ("blocks/attention/q/bias", "blocks/attention_norm/scale"):
        expected = adam([grads[path] for grads in history])
        np.testing.assert_allclose(changes[path], -RATE * expected, rtol=1e-6, err_msg=path)


def state_bytes(name: str, size: dict[str, int]) -> int:
    """Bytes of the optimizer's state, from shapes."""
    changes: dict[str, Any] = {f"model__{key}": value for key, value in size.items()}
    state = Program(small.config("full", optimizer__name=name, **changes), small.mesh()).full_rank
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))


def test_states_are_smaller_than_those_of_adam() -> None:
    of_350m = {"vocab_size": 32100, "hidden": 1024, "mlp": 2736, "layers": 24}
    of_350m |= {"heads": 16, "kv_heads": 16, "head_dim": 64}
    sizes = {name: state_bytes(name, of_350m) for name in ("adamw", "muon", "galore(256, 200)", "scale")}
    assert sizes["adamw"] == pytest.approx(8 * 368_174_080, rel=1e-6)
    assert sizes["galore(256, 200)"] <= 0.6 * sizes["adamw"]
    assert sizes["muon"] == pytest.approx(8 * 368_174_080 - 4 * 302_383_104, rel=0.01)
    assert sizes["scale"] == pytest.approx(4 * 32100 * 1024, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 2, 2)])
def test_run_is_the_same_on_any_mesh(name: str, shape: tuple[int, int, int]) -> None:
    config = small.config("full", optimizer__name=name)
    one, losses = small.run(config, Program(config, small.mesh()))
    program = Program(config, small.mesh(*shape))
    many, others = small.run(config, program)
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    saved = flatten(program.saved(many))
    for path, value in flatten(one).items():
        if path.startswith("trained"):
            assert np.linalg.norm(np.asarray(saved[path]) - value) <= 1e-3 * np.linalg.norm(value), path


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer__name": "sgd"}, "optimizer.name 'sgd' is not valid: use adamw, muon, galore"),
        (
            {"optimizer__name": "galore(0, 200)"},
            "optimizer.name galore(0.0, 200.0): rank and updates",
        ),
        ({"optimizer__name": "galore(8, 1.5)"}, "integers of at least 1"),
        ({"optimizer__name": "galore(inf, 2)"}, "integers of at least 1"),
    ],
)
def test_wrong_name_is_refused_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        validate(small.config("full", **settings), devices=1)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_low_rank_arms_refuse_an_optimizer_for_full_rank() -> None:
    with pytest.raises(UserError, match=r"optimizer\.name muon is for full-rank training: use the arm full"):
        validate(small.config("relora", optimizer__name="muon"), devices=1)


def test_every_text_is_read_as_it_is_printed() -> None:
    for text in ("adamw", "muon", "galore(128.0, 200.0)", "scale"):
        assert str(optimizers.parse(text)) == text
