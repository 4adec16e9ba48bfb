"""Axis names determine the PartitionSpec: layers, rank, norms and indivisible axes are not sharded."""

import pathlib
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from relora_jax import cli, errors, evaluate, generate, train
from relora_jax.config import to_json
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh, spec
from relora_jax.training.state import flatten
from tests.support import small
from tests.support.commands import jax_platforms


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "in", "out"), (4, 8, 6), P(None, "fsdp")),
        (("layers", "in", "out"), (4, 6, 8), P(None, None, "fsdp")),  # the next divisible axis
        (("layers", "in", "out"), (4, 6, 6), P()),  # none is divisible
        (("layers", "in", "rank"), (4, 6, 8), P()),
        (("layers", "rank", "out"), (4, 8, 12), P(None, None, "fsdp")),
        (
            ("vocab", "embed"),
            (32100, 512),
            P(None, "fsdp"),
        ),  # a lookup needs whole rows
        (("vocab", "embed"), (32100, 510), P("fsdp")),
        (("layers", "norm"), (4, 8), P()),
        (("norm",), (8,), P()),
        ((), (), P()),
    ],
)
def test_axis_names_determine_the_sharding(
    axes: tuple[str, ...], shape: tuple[int, ...], expected: P
) -> None:
    assert spec(axes, shape, fsdp=4) == expected


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "embed", "heads"), (2, 16, 8), P(None, "fsdp", "tensor")),
        (("layers", "heads", "embed"), (2, 8, 16), P(None, "tensor", "fsdp")),
        (("layers", "embed", "rank"), (2, 16, 8), P(None, "fsdp")),  # A of gate
        (("layers", "rank", "mlp"), (2, 8, 16), P(None, None, "tensor")),  # B of gate
        (("layers", "mlp", "rank"), (2, 16, 8), P(None, "tensor")),  # A of down
        (("layers", "rank", "embed"), (2, 8, 16), P(None, None, "fsdp")),  # B of down
        (("vocab", "embed"), (62, 16), P("tensor", "fsdp")),
        (("embed", "vocab"), (16, 61), P(("fsdp", "tensor"))),  # unpadded, as in a checkpoint
        (("layers", "norm"), (2, 16), P()),
    ],
)
def test_tensor_splits_heads_mlp_and_vocabulary_on_top_of_fsdp(
    axes: tuple[str, ...], shape: tuple[int, ...], expected: P
) -> None:
    assert spec(axes, shape, fsdp=4, tensor=2) == expected


def test_mesh_uses_the_remaining_devices_or_raises() -> None:
    devices = jax.devices()
    assert dict(make_mesh(data=-1, fsdp=2, tensor=1, devices=devices).shape) == {
        "data": 4,
        "fsdp": 2,
        "tensor": 1,
    }
    for sizes in ({"data": -1, "fsdp": 3}, {"data": 4, "fsdp": 1}, {"data": 3, "fsdp": 3}):
        with pytest.raises(ValueError, match=r"mesh.data=-1, or values whose product is 8"):
            make_mesh(**sizes, tensor=1, devices=devices)


@pytest.mark.parametrize("command", [train, evaluate, generate])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            RuntimeError("Unable to initialize backend 'cuda': no driver (set JAX_PLATFORMS='' to choose)"),
            "the platform cuda (Unable to initialize backend 'cuda': no driver)",
        ),
        (AssertionError(), "the platform cuda (it is not installed)"),
    ],
)
def test_platform_that_cannot_start_is_reported_in_one_line(
    tmp_path: pathlib.Path, command: Any, error: Exception, reason: str, capsys: Any, monkeypatch: Any
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("devices", "device_count", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, fails)
    (tmp_path / "config.json").write_text(to_json(small.config()))
    args = ["--config=configs/quickstart.py"] if command is train else [f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as stop, jax_platforms("cuda"):
        cli.main(command.main, command.__doc__, ["a command", *args])
    assert stop.value.code == errors.BAD_SETTING
    assert capsys.readouterr().err == (
        f"error: jax cannot start {reason}: set JAX_PLATFORMS=cpu, or fix its driver\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_moments_are_sharded_like_their_variables() -> None:
    state = Program(small.config(), small.mesh(1, 4)).low_rank
    specs = {path: leaf.sharding.spec for path, leaf in flatten(state).items()}
    for path, partition in specs.items():
        if "/mu/" in path or "/nu/" in path:
            variable = path.split("/mu/" if "/mu/" in path else "/nu/")[1]
            assert partition == specs[f"trained/{variable}"], path
    assert specs["frozen/blocks/mlp/gate/kernel"] == P(None, "fsdp")
    assert specs["trained/blocks/mlp/gate/lora_b"] == P(None, None, "fsdp")
    assert specs["update"] == specs["tokens_seen"] == P()
