"""What the README says of the library is what happens."""

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

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    """The one block of Python under the heading of the library."""
    section = re.search(r"^## Use it in your own model\n(.*?)(?=^## |\Z)", README.read_text(), re.M | re.S)
    assert section, "README.md has no section '## Use it in your own model'"
    [block] = re.findall(r"^```python\n(.*?)^```", section[1], re.M | re.S)
    return block


def kernels(model: Any) -> list[np.ndarray]:
    return [np.asarray(v[...]) for _, v in nnx.to_flat_state(nnx.state(model, BaseKernel))]


def test_readme_example_trains_a_model_of_ones_own_through_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
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
    with jax.numpy_rank_promotion("allow"):  # as it is outside of our tests
        exec(compile(example(), str(README), "exec"), names)

    losses = names["losses"]
    assert np.mean(losses[-50:]) < 0.5 * losses[0]
    merged = [np.asarray(kernel) for kernel in jax.tree.leaves(nnx.state(names["frozen"], BaseKernel))]
    assert pruned and len(merged) == len(wrapped) > 0
    for old, new in zip(wrapped, merged, strict=True):
        assert old.shape == new.shape
        change = np.linalg.svd(new - old, compute_uv=False)
        assert np.sum(change > 1e-4 * change[0]) > ranks[0]  # more than one merge


def test_everything_that_is_offered_is_there() -> None:
    assert {"wrap", "unwrap", "merge_and_reinit", "with_reset", "reset", "group_labels"} <= {
        *relora_jax.__all__
    }
    assert {"zero", "magnitude", "random", "none"} <= {*relora_jax.__all__}
    assert all(hasattr(relora_jax, name) for name in relora_jax.__all__)
    assert issubclass(LowRankDense, nnx.Module)
