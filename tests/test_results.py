"""The results page has the figures of the studies that are committed."""

import json

import pytest

from scripts import results

PAGE = "# Results\n\n<!-- study a -->\n\nbetween\n\n<!-- study b -->\n\nend\n"
REPORT = "# Study a\n\n## Arms\n\n| full | 2 |\n\n![x](a_curves.png)\n"


def test_report_takes_the_place_of_an_earlier_one() -> None:
    once = results.taken(PAGE, "a", REPORT)
    assert "#### Arms" in once and "](studies/a_curves.png)" in once and "# Study a" not in once
    assert once.index("| full | 2 |") < once.index("between") < once.index("<!-- study b -->")
    both = results.taken(once, "b", REPORT.replace("2", "7"))
    again = results.taken(both, "a", REPORT.replace("2", "3"))
    assert again == both.replace("| full | 2 |", "| full | 3 |")
    with pytest.raises(ValueError, match="study c"):
        results.taken(PAGE, "c", REPORT)


def test_page_has_the_perplexity_and_difference_of_every_arm() -> None:
    page = results.PAGE.read_text()
    for file in sorted(results.FIGURES.glob("*.json")):
        study = json.loads(file.read_text())
        block = page.split(f"<!-- study {study['study']} -->")[1].split(results.END)[0]
        for name, arm in study["arms"].items():
            difference = arm["difference"]
            row = f"| {name} | {arm['best_rate']:g} | {len(arm['losses'])} | {arm['perplexity']:,.1f}"
            line = next(line for line in block.splitlines() if line.startswith(row))
            assert difference is None or f"{difference['mean']:+.3f}" in line
