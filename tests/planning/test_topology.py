"""Topologies: names, what must be installed for them, and one program really compiled for each kind."""

import importlib.util
import re

import pytest

from configs import quickstart
from relora_jax.errors import UserError
from relora_jax.planning import arms
from relora_jax.planning.compiled import Compiler
from relora_jax.planning.topology import PLUGINS, make_topology
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh
from tests.support import small


@pytest.mark.parametrize("name", ["", "v5e", "h100", "tpu:2x2", "h100:1x8", "h100:0", "v5e:4", "v5e:4x4x4x4"])
def test_unknown_topology_is_one_line_with_those_known(name: str) -> None:
    with pytest.raises(UserError, match="one of v5e, v5p, v6e, h100, h200, such as v5e:4x4"):
        make_topology(name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:4x4", "tpu"), ("h100:8", "plan-cuda")])
def test_missing_plugin_is_one_line_with_the_extra(
    name: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"is not installed: pip install 'relora-jax\[{extra}\]'$"):
        make_topology(name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "slices"), [("v5p:2x2x1", 2), ("h100:8", 1)])
def test_compiled_program_has_the_flops_of_the_model_and_sends_less_between_slices(
    name: str, slices: int
) -> None:
    platform = "cuda" if name.startswith("h100") else "tpu"
    modules = PLUGINS[platform][0]
    if not any(importlib.util.find_spec(module) for module in modules):
        pytest.skip(f"needs {' or '.join(modules)}")
    topology = make_topology(name, slices=slices)
    assert (len(topology.devices), topology.slice_size) == (8, 8 // slices)
    compiler, plans = Compiler(topology), []
    for arm in ("full", "relora"):
        config = small.config(arm, mesh__data=2, mesh__fsdp=4, train__microbatch=8, train__batch=16)
        config.model.hidden, config.model.mlp, config.relora.rank = 128, 256, 8
        plans.append(arms.plan(config, topology, compiler, search=False))
    for plan in plans:
        assert all(map(plan.fits, plan.programs))
        assert plan.flops_per_token == pytest.approx(plan.model_flops_per_token, rel=0.05)
    full, relora = (sum(p.update.costs.bytes_by_kind(between=slices > 1).values()) for p in plans)
    assert 0 < relora < full


@pytest.mark.slow
def test_gpu_computes_attention_with_cudnn() -> None:
    if not any(importlib.util.find_spec(module) for module in PLUGINS["cuda"][0]):
        pytest.skip("needs jax_cuda12_plugin or jax_cuda13_plugin")
    config = small.config("full", model__compute_dtype="bfloat16", model__head_dim=8, train__microbatch=8)
    topology = make_topology("h100:1")
    plan = arms.plan(config, topology, Compiler(topology), search=False)
    # its backward pass computes q k^T once more
    again = 2 * config.data.sequence_length * config.model.heads * config.model.head_dim * config.model.layers
    assert plan.flops_per_token == plan.model_flops_per_token + again


@pytest.mark.slow
def test_gpu_transposes_8_bit_kernels_layer_by_layer() -> None:
    if not any(importlib.util.find_spec(module) for module in PLUGINS["cuda"][0]):
        pytest.skip("needs jax_cuda12_plugin or jax_cuda13_plugin")
    config = quickstart.get_config()
    config.model.compute_dtype, config.model.attention, config.model.layers = "bfloat16", "xla", 5
    config.relora.base_dtype, config.relora.product = "float8_e4m3", "separate"
    mesh = make_mesh(**vars(config.mesh), devices=make_topology("h100:1").devices)
    text = Program(config, mesh).lower("low_rank_update").compile().as_text()
    assert "f8e4m3fn[5,96,256]" in text
    assert not re.search(r"f8e4m3fn\[\d+,5,\d+\]", text)


@pytest.mark.slow
def test_shape_that_no_chip_has_is_one_line() -> None:
    if not importlib.util.find_spec("libtpu"):
        pytest.skip("needs libtpu")
    with pytest.raises(UserError, match=r"tpu has no topology 'v5e:3x3' .*: try v5e:4x4"):
        make_topology("v5e:3x3")
