"""The documented examples of the library work."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import relora_jax
from relora_jax import BaseKernel, LowRankDense
from relora_jax.core import low_rank
from relora_jax.core import reset as core_reset

ROOT = Path(__file__).parent.parent


def examples(page: str) -> list[str]:
    """The page's blocks of Python."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


EXAMPLES = [(page, n) for page in ("README.md", "docs/own_model.md") for n in range(len(examples(page)))]


def kernels(model: Any) -> list[np.ndarray]:
    return [np.asarray(v[...]) for _, v in nnx.to_flat_state(nnx.state(model, BaseKernel))]


FAST = ("README.md",)


@pytest.mark.parametrize(
    ("page", "number"),
    [pytest.param(page, n, marks=() if page in FAST else pytest.mark.slow) for page, n in EXAMPLES],
)
def test_documented_example_trains_a_custom_model_through_restarts(
    page: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped: list[np.ndarray] = []
    pruned: list[Any] = []
    ranks: list[int] = []

    def wrap(model: Any, **options: Any) -> Any:
        model = low_rank.wrap(model, **options)
        wrapped.extend(kernels(model))
        ranks.append(options["rank"])
        return model

    def reset(opt_state: Any, key: Any) -> Any:
        pruned.append(core_reset.reset(opt_state, key))
        return pruned[-1]

    monkeypatch.setattr(relora_jax, "wrap", wrap)
    monkeypatch.setattr(relora_jax, "reset", reset)
    names: dict[str, Any] = {}
    with jax.numpy_rank_promotion("allow"):  # the default, unlike in our tests
        exec(compile(examples(page)[number], page, "exec"), names)

    losses = names["losses"]
    assert np.mean(losses[-50:]) < 0.5 * losses[0]
    merged = kernels(names["model"])
    assert pruned and len(merged) == len(wrapped) > 0
    for old, new in zip(wrapped, merged, strict=True):
        assert old.shape == new.shape
        change = np.linalg.svd(new - old, compute_uv=False)
        assert np.sum(change > 1e-4 * change[0]) > ranks[0]  # more than one merge
    if page == "README.md":
        x = names["x"]
        np.testing.assert_allclose(names["plain"](x), names["model"](x), rtol=1e-4, atol=1e-5)


def test_documented_transformer_has_low_rank_attention() -> None:
    assert len(EXAMPLES) == 3 and "nnx.MultiHeadAttention(" in examples("docs/own_model.md")[1]
    assert sum(bool(line) for line in examples("docs/own_model.md")[1].splitlines()) <= 25


def test_every_public_name_exists() -> None:
    assert {"wrap", "unwrap", "merge_and_reinit", "with_reset", "reset", "group_labels"} <= {
        *relora_jax.__all__
    }
    assert {"zero", "magnitude", "random", "none"} <= {*relora_jax.__all__}
    assert all(hasattr(relora_jax, name) for name in relora_jax.__all__)
    assert issubclass(LowRankDense, nnx.Module)
