"""The results page and the README have the figures of the studies that are committed."""

import json
from pathlib import Path
from typing import Any

import pytest

from relora_jax.errors import UserError
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


def study() -> dict[str, Any]:
    return json.loads((results.FIGURES / "study_small.json").read_text())["arms"]


@pytest.mark.parametrize("file", sorted(results.FIGURES.glob("*.json")), ids=lambda file: file.stem)
def test_page_has_the_perplexity_and_difference_of_every_arm(file: Path) -> None:
    of = json.loads(file.read_text())
    block = results.PAGE.read_text().split(f"<!-- study {of['study']} -->")[1].split(results.END)[0]
    for name, arm in of["arms"].items():
        difference = arm["difference"]
        row = f"| {name} | {arm['best_rate']:g} | {len(arm['losses'])} | {arm['perplexity']:,.1f}"
        line = next(line for line in block.splitlines() if line.startswith(row))
        assert difference is None or f"{difference['mean']:+.3f}" in line


def test_readme_has_the_perplexities_of_the_study() -> None:
    columns = ["full", "muon", "scale", "galore", "lora", "lora_warm", "relora", "relora_cold", "one_sided"]
    row = " | ".join(f"{study()[name]['perplexity']:.1f}" for name in columns)
    assert f"| perplexity | {row} |" in README.read_text()


@pytest.mark.parametrize(
    ("arm", "other"),
    [
        ("lora_warm", "relora"),
        ("lora", "relora_cold"),
        ("one_sided", "relora"),
        ("one_sided_cold", "relora_cold"),
    ],
)
def test_differences_that_the_text_quotes_are_those_of_the_study(arm: str, other: str) -> None:
    ours, theirs = (dict(enumerate(study()[name]["losses"])) for name in (arm, other))
    difference = paired(ours, theirs)
    assert difference is not None and difference.mean > 0
    quoted = f"{difference.mean:.3f} ± {difference.half_width:.3f}"
    before, _, after = results.PAGE.read_text().partition("<!-- study study_small -->")
    assert quoted in before + after.split(results.END)[1]
    assert not difference.is_clear or quoted in README.read_text()
