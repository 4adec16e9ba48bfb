"""The results page and the README have the figures of the studies that are committed."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from configs import quickstart, study_quickstart, study_small
from relora_jax.config import flatten, to_json
from relora_jax.errors import UserError
from relora_jax.studies import grid
from relora_jax.studies.results import paired
from scripts import results

README = results.ROOT / "README.md"
PAGE = "# Results\n\n<!-- study a -->\n\nbetween\n\n<!-- study b -->\n\nend\n"
REPORT = "# Study a\n\n## Arms\n\n| full | 2 |\n\n![x](a_curves.png)\n"


def test_report_takes_the_place_of_an_earlier_one() -> None:
    once = results.taken(PAGE, "a", REPORT)
    assert "#### Arms" in once and "](studies/a_curves.png)" in once and "# Study a" not in once
    assert once.index("| full | 2 |") < once.index("between") < once.index("<!-- study b -->")
    both = results.taken(once, "b", REPORT.replace("2", "7"))
    again = results.taken(both, "a", REPORT.replace("2", "3"))
    assert again == both.replace("| full | 2 |", "| full | 3 |")
    with pytest.raises(UserError, match="study c"):
        results.taken(PAGE, "c", REPORT)


def study(name: str) -> dict[str, Any]:
    return json.loads((results.FIGURES / f"{name}.json").read_text())["arms"]


@pytest.mark.parametrize("file", sorted(results.FIGURES.glob("*.json")), ids=lambda file: file.stem)
def test_page_has_the_perplexity_and_difference_of_every_arm(file: Path) -> None:
    of = json.loads(file.read_text())
    block = results.PAGE.read_text().split(f"<!-- study {of['study']} -->")[1].split(results.END)[0]
    for name, arm in of["arms"].items():
        difference = arm["difference"]
        row = f"| {name} | {arm['best_rate']:g} | {len(arm['losses'])} | {arm['perplexity']:,.1f}"
        line = next(line for line in block.splitlines() if line.startswith(row))
        assert difference is None or f"{difference['mean']:+.3f}" in line


@pytest.mark.parametrize(
    ("name", "updates", "row"),
    [
        (
            "study_small",
            "1,500",
            ["full", "muon", "scale", "galore", "lora", "lora_warm", "relora", "relora_cold", "one_sided"],
        ),
        ("study_quickstart", "3,400", ["full", "", "", "", "lora", "lora_warm", "relora", "relora_cold", ""]),
    ],
)
def test_readme_has_the_perplexities_of_the_study(name: str, updates: str, row: list[str]) -> None:
    arms = study(name)
    cells = " | ".join(f"{arms[arm]['perplexity']:.1f}" if arm else "" for arm in row)
    assert f"| {updates} | {cells} |" in README.read_text()


def test_ablation_has_the_perplexities_of_the_study() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(?:[ x]*\|){4} ([\d.]+) \|", results.PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 8
    assert dict(rows) == {arm: f"{study('study_quickstart')[arm]['perplexity']:.1f}" for arm, _ in rows}


@pytest.mark.parametrize(
    "study",
    [study_quickstart.get_config(), study_small.get_config(), study_small.get_config("scale")],
    ids=lambda study: study.name,
)
def test_studies_had_the_settings_of_their_configs(study: grid.Study) -> None:
    base = json.loads((results.FIGURES / f"{study.name}.json").read_text())["base"]
    own = json.loads(to_json(study.base))
    assert base.pop("relora") | {"peak_lr": 0} == own.pop("relora") | {"peak_lr": 0}  # each arm has its own
    assert base == own


@pytest.mark.parametrize("arm", ["full", "lora", "lora_warm", "relora"])
def test_quickstart_trains_what_its_study_found_best(arm: str) -> None:
    run = grid.Run(arm, study("study_quickstart")[arm]["best_rate"], 0)
    best = {key: value for key, value, _ in flatten(grid.config(study_quickstart.get_config(), run, Path()))}
    own = {key: value for key, value, _ in flatten(quickstart.get_config(arm))}
    differing = {key for key in own if own[key] != best[key]}
    assert differing <= {"name", "train.keep_last", "train.init_from"}


@pytest.mark.parametrize("other", ["lora", "lora_warm"])
def test_quickstart_is_below_lora_by_more_than_the_spread_of_seeds(other: str) -> None:
    arms = study("study_quickstart")
    theirs, ours = arms[other]["losses"], arms["relora"]["losses"]
    differences = [a - b for a, b in zip(theirs, ours, strict=True)]
    spread = max(statistics.stdev(theirs), statistics.stdev(ours))
    assert statistics.mean(differences) > spread
    page, readme = (" ".join(file.read_text().split()) for file in (results.PAGE, README))
    assert f"{statistics.mean(differences[1:]):.3f} below `{other}`" in page
    assert f"at most {spread:.3f}" in page and f"differ by {spread:.3f}" in readme


@pytest.mark.parametrize(
    ("name", "arm", "other"),
    [
        ("study_quickstart", "lora", "relora"),
        ("study_quickstart", "lora_warm", "relora"),
        ("study_quickstart", "lora", "relora_cold"),
        ("study_quickstart", "lora", "restarts"),
        ("study_quickstart", "restarts", "restarts_reset"),
        ("study_quickstart", "relora_cold", "restarts_reset"),
        ("study_quickstart", "relora_late", "relora_cold"),
        ("study_small", "lora_warm", "relora"),
        ("study_small", "lora", "relora_cold"),
        ("study_small", "one_sided", "relora"),
        ("study_small", "one_sided_cold", "relora_cold"),
        ("study_small_scale", "relora@9m", "full@9m"),
        ("study_small_scale", "lora_warm@9m", "relora@9m"),
        ("study_small_scale", "one_sided@9m", "relora@9m"),
    ],
)
def test_differences_that_the_text_quotes_are_those_of_the_study(name: str, arm: str, other: str) -> None:
    ours, theirs = (dict(enumerate(study(name)[of]["losses"])) for of in (arm, other))
    difference = paired(ours, theirs)
    assert difference is not None and difference.mean > 0
    quoted = f"{difference.mean:.3f} ± {difference.half_width:.3f}"
    text = re.sub(f"<!-- study .*?{results.END}", "", results.PAGE.read_text(), flags=re.DOTALL)
    assert quoted in text
    assert (name, other) != ("study_quickstart", "relora") or quoted in README.read_text()
