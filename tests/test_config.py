"""Configs are valid and round-trip through JSON; each field states whether it decides the result."""

import dataclasses
import importlib
import itertools
import json
import pathlib

import pytest

from relora_jax import cli, config, shapes
from relora_jax.core import prune
from relora_jax.errors import UserError
from relora_jax.studies import grid
from relora_jax.validate import validate
from tests.support import small

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
STUDIES = {"study_quickstart": ("",), "study_small": ("", ":controls", ":scale")}
ONE_SIDED = "quickstart_one_sided"  # has no arms
CONFIGS = sorted({path.stem for path in FOLDER.glob("*.py")} - {*STUDIES, ONE_SIDED})
RUN = {
    *(
        "name",
        "model.remat",
        "model.attention",
        "model.max_positions",
        "model.sliding_window",
        "relora.product",
    ),
    *("train.microbatch", "train.log_every_updates", "train.evaluate_every_updates"),
    *("train.save_every_updates", "train.eval_tokens", "train.keep_last"),
    *("train.keep_every", "train.wandb", "train.profile", "mesh.data", "mesh.fsdp", "mesh.tensor"),
}


@pytest.mark.parametrize(
    ("name", "arm"), [*itertools.product(CONFIGS, config.ARMS), (ONE_SIDED, "")], ids="-".join
)
def test_every_config_and_arm_is_valid_and_round_trips(
    name: str, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
    parsed, _ = cli.parse(["train", f"--config=configs/{name}.py:{arm}".rstrip(":")])
    validate(parsed, devices=8)
    assert (parsed.name, parsed.arm) == (name, arm or "relora")
    assert config.from_json(config.to_json(parsed)) == parsed
    assert parsed.relora.dropout == 0 or parsed.relora.product == "separate"
    module = importlib.import_module(f"configs.{name}")
    assert module.__doc__ and f"--config=configs/{name}.py" in module.__doc__


def test_config_without_arms_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    with pytest.raises(UserError, match="offers no choice"):
        cli.parse(["train", f"--config=configs/{ONE_SIDED}.py:full"])


@pytest.mark.parametrize("name", CONFIGS)
def test_control_has_about_as_many_parameters_as_relora_trains(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pathlib.Path(__file__).parent.parent)
    control, relora = (
        cli.parse(["train", f"--config=configs/{name}.py:{arm}"])[0] for arm in ("control", "relora")
    )
    total, trained = shapes.count(control).full_rank_total, shapes.count(relora).trained
    assert abs(total / trained - 1) < 0.07, (total, trained)
    assert shapes.count(control).frozen == 0


@pytest.mark.parametrize(("name", "choice"), [(name, choice) for name in STUDIES for choice in STUDIES[name]])
def test_every_arm_of_a_study_is_valid(name: str, choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parent)
    assert {path.stem for path in FOLDER.glob("study_*.py")} == {*STUDIES}
    study, _ = cli.parse_as(grid.Study, ["study", f"--config=configs/{name}.py{choice}"], {})
    grid.check(study)
    assert study.name == name + choice.replace(":", "_") and len(study.arms) > 2
    for arm in study.arms:
        of_arm = grid.config(study, grid.Run(arm, 1e-3, 0), pathlib.Path("runs"))
        validate(of_arm, devices=1)
        assert config.from_json(config.to_json(of_arm)) == of_arm
    module = importlib.import_module(f"configs.{name}")
    assert module.__doc__ and f"--config=configs/{name}.py" in module.__doc__


def test_tensor_must_divide_key_value_heads_too() -> None:
    grouped = small.config(mesh__tensor=4, train__microbatch=8)  # 4 heads, 2 key-value heads
    with pytest.raises(ValueError, match=r"mesh\.tensor 4 splits whole heads.*set it to a divisor of 2"):
        validate(grouped, devices=8)
    validate(small.config(mesh__tensor=2, train__microbatch=4), devices=8)  # shared by 4 of the 8


def test_size_without_a_control_is_refused_with_the_sizes_that_have_one() -> None:
    with pytest.raises(ValueError, match="60m, 130m, 250m, 350m, 1b, 7b, 2m and quickstart"):
        shapes.control("9m")


def test_fields_that_decide_only_the_run() -> None:
    decides_run = {key for key, _, field in config.flatten(small.config()) if field.metadata == config.RUN}
    assert decides_run == RUN


def test_only_fields_that_decide_the_result_are_reported_as_changed() -> None:
    before = small.config()
    for key, value, field in config.flatten(before):
        if key in ("name", "arm") or isinstance(value, (str, tuple, prune.Prune)):
            continue
        group, name = key.split(".")
        other = small.config(**{f"{group}__{name}": not value if isinstance(value, bool) else value + 1})
        changed = config.changed_results(before, other)
        assert changed == (
            []
            if field.metadata == config.RUN
            else [f"{key}: {value} -> {getattr(getattr(other, group), name)}"]
        )


def test_only_names_and_paths_with_compared_content_may_change() -> None:
    compared = {key for key, _, field in config.flatten(small.config()) if field.metadata == config.CONTENT}
    assert compared == {"data.dataset", "data.text", "data.validation_text", "data.tokenizer"}
    for key in compared:
        assert not config.changed_results(small.config(), small.config(**{key.replace(".", "__"): "other"}))
    for name in ("data__train_split", "data__packing", "data__text_field", "train__init_from"):
        assert config.changed_results(small.config(), small.config(**{name: "other"}))


def test_microbatch_decides_the_result_only_with_dropout() -> None:
    drop = {"relora__dropout": 0.1}
    assert config.changed_results(small.config(**drop), small.config(**drop, train__microbatch=2))
    assert not config.changed_results(small.config(), small.config(train__microbatch=2))


def test_saved_config_of_another_version_is_refused_in_one_line() -> None:
    groups = json.loads(config.to_json(small.config()))
    groups["relora"]["ranks"] = groups["relora"].pop("rank")
    for text in (json.dumps(groups), "{", "[]", "{}"):
        with pytest.raises(ValueError, match="cannot read"):
            config.from_json(text)


def test_config_is_saved_with_the_grammar_of_prune() -> None:
    text = config.to_json(dataclasses.replace(small.config("relora", relora__prune=prune.random(0.25))))
    assert json.loads(text)["relora"]["prune"] == "random(0.25)"
