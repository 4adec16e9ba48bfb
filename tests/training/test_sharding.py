"""One rule from names of axes to a PartitionSpec: layers, rank, norms and what does not divide are whole."""

import pathlib
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from relora_jax import cli, errors, evaluate, generate, train
from relora_jax.config import to_json
from relora_jax.training.program import Program
from relora_jax.training.sharding import make_mesh, spec
from tests.support import small
from tests.support.commands import asked_for


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("layers", "in", "out"), (4, 8, 6), P(None, "fsdp")),
        (("layers", "in", "out"), (4, 6, 8), P(None, None, "fsdp")),  # the next that divides
        (("layers", "in", "out"), (4, 6, 6), P()),  # none divides
        (("layers", "in", "rank"), (4, 6, 8), P()),
        (("layers", "rank", "out"), (4, 8, 12), P(None, None, "fsdp")),
        (("vocab", "embed"), (32100, 512), P("fsdp")),
        (("vocab", "embed"), (4097, 512), P(None, "fsdp")),
        (("layers", "norm"), (4, 8), P()),
        (("norm",), (8,), P()),
        ((), (), P()),
    ],
)
def test_names_of_axes_decide_the_sharding(
    axes: tuple[str, ...], shape: tuple[int, ...], expected: P
) -> None:
    assert spec(axes, shape, fsdp=4) == expected


def test_mesh_takes_the_devices_that_are_left_or_refuses() -> None:
    devices = jax.devices()
    assert dict(make_mesh(data=-1, fsdp=2, tensor=1, devices=devices).shape) == {
        "data": 4,
        "fsdp": 2,
        "tensor": 1,
    }
    for wrong in ({"data": -1, "fsdp": 3}, {"data": 4, "fsdp": 1}, {"data": 3, "fsdp": 3}):
        with pytest.raises(ValueError, match=r"mesh.data=-1, or values whose product is 8"):
            make_mesh(**wrong, tensor=1, devices=devices)


@pytest.mark.parametrize("command", [train, evaluate, generate])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("Unable to initialize backend 'cuda': no driver (set JAX_PLATFORMS='' to choose)"),
            "the platform cuda (Unable to initialize backend 'cuda': no driver)",
        ),
        (AssertionError(), "the platform cuda (it is not installed)"),
    ],
)
def test_a_platform_that_cannot_start_is_told_in_one_line(
    tmp_path: pathlib.Path, command: Any, error: Exception, told: str, capsys: Any, monkeypatch: Any
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise error

    for name in ("devices", "device_count", "local_devices", "default_backend"):
        monkeypatch.setattr(jax, name, fails)
    (tmp_path / "config.json").write_text(to_json(small.config()))
    words = ["--config=configs/quickstart.py"] if command is train else [f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as stop, asked_for("cuda"):
        cli.main(command.main, command.__doc__, ["a command", *words])
    assert stop.value.code == errors.BAD_SETTING
    assert capsys.readouterr().err == (
        f"error: jax cannot start {told}: set JAX_PLATFORMS=cpu, or mend its driver\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_moments_lie_where_their_variables_lie() -> None:
    state = Program(small.config(), small.mesh(1, 4)).low_rank
    places = {path: leaf.sharding.spec for path, leaf in _flat(state).items()}
    for path, place in places.items():
        if "/mu/" in path or "/nu/" in path:
            variable = path.split("/mu/" if "/mu/" in path else "/nu/")[1]
            assert place == places[f"trained/{variable}"], path
    assert places["frozen/blocks/mlp/gate/kernel"] == P(None, "fsdp")
    assert places["trained/blocks/mlp/gate/lora_b"] == P(None, None, "fsdp")
    assert places["update"] == places["tokens_seen"] == P()


def _flat(state: object) -> dict[str, jax.ShapeDtypeStruct]:
    from relora_jax.training.state import flatten

    return flatten(state)  # pyright: ignore
