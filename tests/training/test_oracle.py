"""Whole small runs agree with a float64 reference that was written from the paper, not from this code."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from relora_jax.config import Config
from relora_jax.core import prune
from relora_jax.shapes import target_kernels
from relora_jax.training import steps
from relora_jax.training.program import Program
from relora_jax.training.state import flatten
from tests.support import oracle, small
from tests.support.small import VARIABLE_PATHS

# Without a warm-up, Adam's first step normalizes entries that are pure rounding noise, so a float32 run would
# compare noise. An epsilon above the noise avoids that.
EPS = 1e-4

VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude": {"relora__prune": prune.magnitude(0.9), "optimizer__weight_decay": 0.1},
    "zero": {"relora__prune": prune.zero()},
    "zero, count reset": {"relora__prune": prune.zero(), "relora__reset_count": True},
    "random, two merges a cycle": {"relora__prune": prune.random(0.7), "relora__merges_per_cycle": 2},
    "none, not jagged": {"relora__prune": prune.none(), "relora__jagged": False},
    "magnitude, no count reset, b2 .95": {"relora__prune": prune.magnitude(0.5), "optimizer__b2": 0.95},
    "tied, clipped hard": {"model__tied_embeddings": True, "optimizer__clip_norm": 0.05},
    "not clipped, factors at twice the rate": {"optimizer__clip_norm": 0.0, "relora__factor_lr_ratio": 2.0},
    "attention alone": {"relora__targets": ("attention",)},
    "single kernels": {"relora__targets": ("q", "down")},
    "kernels at a third, decayed": {
        "relora__targets": ("attention",),
        "optimizer__kernel_lr_ratio": 1 / 3,
        "optimizer__weight_decay": 0.1,
    },
    "no warm start, zero base": {
        "relora__warm_start_updates": 0,
        "relora__base_init": "zero",
        "train__updates": 14,
    },
    "no warm-ups": {
        "optimizer__warm_up_updates": 0,
        "relora__warm_up_updates": 0,
        "relora__restart_warm_up_updates": 0,
        "optimizer__eps": EPS,
    },
    "fused": {"relora__product": "fused"},
    "biases": {"model__family": "qwen2", "optimizer__weight_decay": 0.1},
    "head norms": {"model__family": "qwen3", "optimizer__weight_decay": 0.1},
    "remat": {"model__remat": "dots"},
    "one microbatch": {"train__microbatch": 8},
    "one-sided": {"relora__restart": "one_sided", "relora__prune": prune.magnitude(0.5)},
    "one-sided, fused, decayed": {
        "relora__restart": "one_sided",
        "relora__product": "fused",
        "relora__prune": prune.zero(),
        "relora__merges_per_cycle": 2,
        "optimizer__weight_decay": 0.1,
    },
    "one-sided, orthonormal, never merged": {"arm": "lora_warm", "relora__restart": "one_sided_orthonormal"},
    "published mistake": {"relora__restart": "merge_and_reinit_late"},
    "arm full": {"arm": "full"},
    "arm lora": {"arm": "lora"},
    "arm lora_warm": {"arm": "lora_warm"},
}
FAST = ("magnitude", "kernels at a third, decayed", "one-sided, fused, decayed")
# If all kernels start at 0, the gradients of q and k are below float32 resolution, and Adam takes full steps
# along that noise. In float64 the run is compared like any other.
FLOAT64_ONLY = ("no warm start, zero base",)


def rows(fast: tuple[str, ...]) -> list[Any]:
    """Every variant; those not in `fast` are marked slow."""
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow, id=name) for name in VARIANTS]


@pytest.mark.parametrize("name", rows(FAST))
def test_run_in_float64_equals_oracle(name: str) -> None:
    with jax.enable_x64(True):
        ours, history = compare(variant(name, "float64"), tie=0.0)
        np.testing.assert_allclose(ours.losses, history.losses, rtol=1e-8)
        for path, (mine, theirs) in ours.pairs(history).items():
            assert norm(mine - theirs) <= 1e-8 * norm(theirs), path


@pytest.mark.slow
@pytest.mark.parametrize("name", [row for row in rows(FAST) if row.id not in FLOAT64_ONLY])
def test_run_in_float32_stays_within_rounding_of_oracle(name: str) -> None:
    ours, history = compare(variant(name, "float32"), tie=1e-5)
    np.testing.assert_allclose(ours.losses, history.losses, rtol=1e-4)
    for path, (mine, theirs) in ours.pairs(history).items():
        assert norm(mine - theirs) <= 1e-4 * norm(theirs), path


def test_skipped_update_advances_only_counters_like_the_oracle() -> None:
    with jax.enable_x64(True):
        config = variant("magnitude", "float64")
        ours, history = compare(config, tie=0.0, empty=(3, 9))
        assert history.skipped == 2 == int(ours.end.skipped)
        for path, (mine, theirs) in ours.pairs(history).items():
            assert norm(mine - theirs) <= 1e-8 * norm(theirs), path


def variant(name: str, dtype: str) -> Config:
    """The config of the small run with the changes of a variant: three restarts, accumulation 2."""
    changes = dict(VARIANTS[name])
    config = small.config(changes.pop("arm", "relora"), model__attention="einsum", train__updates=18)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype=dtype))
    config.relora.base_dtype = dtype
    for key, value in changes.items():
        group, field = key.split("__")
        setattr(getattr(config, group), field, value)
    return config


@dataclasses.dataclass
class Ours:
    """Our run, and what the oracle takes from it: drawn factors and prune masks, by (update, name)."""

    initial: oracle.Params
    losses: list[float]
    draws: dict[tuple[int, str], np.ndarray]
    masks: dict[tuple[int, str], np.ndarray]
    end: Any = None

    def pairs(self, history: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{path: (ours, the oracle's)} for weights, moments and counts at the end."""
        flat = flatten(self.end)
        weights, moments = named(flat), {m: named(flat, m) for m in ("mu", "nu")}
        assert weights.keys() == history.params.keys()
        pairs = {path: (weights[path], theirs) for path, theirs in history.params.items()}
        for m, theirs in (("mu", history.mu), ("nu", history.nu)):
            assert moments[m].keys() == theirs.keys()
            pairs |= {f"{m} of {path}": (moments[m][path], value) for path, value in theirs.items()}
        counts = {"rest": history.count_rest}
        if any(path.endswith(".a") for path in weights):
            counts["factors"] = history.count_factors
        for group, count in counts.items():
            [mine] = [v for k, v in flat.items() if f"inner_states/{group}/" in k and k.endswith("/count")]
            pairs[f"count of {group}"] = (np.float64(mine), np.float64(count))
        tokens = int(self.end.tokens_seen[0]) + 2**32 * int(self.end.tokens_seen[1])
        return pairs | {"tokens_seen": (np.float64(tokens), np.float64(history.tokens_seen))}


def compare(config: Config, *, tie: float, empty: tuple[int, ...] = ()) -> tuple[Ours, Any]:
    """(our run, the oracle's run from our initial values, draws and random masks).

    Magnitude masks may differ only for entries within `tie` of the threshold; the oracle then uses ours.
    """

    def batches(u: int) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = small.rows(config, u)
        return ids, lengths * (u not in empty)

    ours = our_run(config, batches)

    def adjust(u: int, name: str, mask: np.ndarray, moment: np.ndarray) -> np.ndarray:
        mine = ours.masks[u, name]
        np.testing.assert_array_equal(mine.sum((1, 2)), mask.sum((1, 2)))
        size = np.abs(moment)
        threshold = np.where(mask, size, np.inf).min((1, 2), keepdims=True)
        assert np.all((mine == mask) | (np.abs(size - threshold) <= tie * threshold)), (u, name)
        return mine

    history = oracle.run(
        oracle_model(config),
        oracle_settings(config),
        ours.initial,
        batches,
        lambda u, name: ours.draws[u, f"{name}.a"],
        lambda u, name: ours.masks[u, name],
        adjust,
        lambda u, name: ours.draws[u, f"{name}.b"],
    )
    return ours, history


def our_run(config: Config, batches: Any) -> Ours:
    program = Program(config, small.mesh())
    state = program.init()
    ours = Ours(named(flatten(state)), [], {}, {})
    for u in range(config.train.updates):
        state, _ = program.begin_update(u, state)
        if any(steps.due(config, u)):
            flat = flatten(state)
            ours.draws |= {(u, name): value for name, value in named(flat).items() if "." in name}
            ours.masks |= {(u, name): value != 0 for name, value in named(flat, "mu").items() if "." in name}
        parts = (jax.device_put(part, program.rows) for part in batches(u))
        state, values = program.train_step(state, small.Batch(*parts), steps.learning_rate(config, u))
        ours.losses.append(float(values["loss"]) if int(values["skipped_in_row"]) == 0 else float("nan"))
    ours.end = state
    return ours


def named(flat: dict[str, Any], moment: str = "") -> oracle.Params:
    """Weights, or one of their moments, by the oracle's names, in float64."""
    arrays = {}
    for name, suffix in VARIABLE_PATHS.items():
        for path, value in flat.items():
            inside = f"/{moment}/" in path if moment else path.startswith(("trained/", "frozen/"))
            if inside and path.endswith(f"/{suffix}"):
                arrays[name] = np.asarray(value, np.float64)
    return arrays


def oracle_model(config: Config) -> oracle.Model:
    m = config.model
    return oracle.Model(
        m.vocab_size,
        *(m.hidden, m.mlp, m.layers, m.heads, m.kv_heads, m.head_dim, m.rope_theta, m.rms_eps),
        tied=m.tied_embeddings,
    )


def oracle_settings(config: Config) -> oracle.Settings:
    r, o = config.relora, config.optimizer
    return oracle.Settings(
        updates=config.train.updates,
        warm_start=r.warm_start_updates,
        arm={"lora_warm": "lora", "control": "full"}.get(config.arm, config.arm),
        rank=r.rank,
        alpha=r.alpha,
        targets=tuple(target_kernels(config)),
        cycle=r.cycle_updates,
        merges_per_cycle=r.merges_per_cycle,
        restart_warm_up=r.restart_warm_up_updates,
        warm_up=r.warm_up_updates,
        jagged=r.jagged,
        peak_lr=r.peak_lr,
        factor_lr_ratio=r.factor_lr_ratio,
        prune=r.prune.kind,
        fraction=getattr(r.prune, "prune_fraction", 0.0),
        reset_count=r.reset_count,
        base_init=r.base_init,
        trains_a=not r.restart.startswith("one_sided"),
        full_peak_lr=o.peak_lr,
        full_warm_up=o.warm_up_updates,
        kernel_lr_ratio=o.kernel_lr_ratio,
        min_lr_ratio=o.min_lr_ratio,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
    )


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x))
