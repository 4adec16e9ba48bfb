"""The results page and the README have the figures of the studies that are committed."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from configs import quickstart, quickstart_one_sided, study_quickstart, study_small
from relora_jax import cli, shapes
from relora_jax.config import LOW_RANK_ARMS, flatten, to_json
from relora_jax.errors import UserError
from relora_jax.studies import grid, page
from relora_jax.studies.results import Difference, paired
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
            [
                "full",
                "muon",
                "scale",
                "galore",
                "lora",
                "lora_warm",
                "relora",
                "relora_cold",
                "one_sided_rank32",
            ],
        ),
        (
            "study_quickstart",
            "3,400",
            ["full", "", "", "", "lora", "lora_warm", "relora", "relora_cold", "one_sided_rank32"],
        ),
    ],
)
def test_readme_has_the_perplexities_of_the_study(name: str, updates: str, row: list[str]) -> None:
    arms = study(name)
    cells = " | ".join(f"{arms[arm]['perplexity']:.1f}" if arm else "" for arm in row)
    assert f"| {updates} | {cells} |" in README.read_text()


def test_ablation_has_what_its_arms_do_and_the_figures_of_the_study() -> None:
    of = study_quickstart.get_config()
    rows = re.findall(r"^\| `(\w+)` \|((?:[ x]*\|){4}) ([\d.]+) \| ([\d.]+) \|", prose(), re.MULTILINE)
    assert len(rows) == 8
    for name, marks, rate, perplexity in rows:
        arm = study("study_quickstart")[name]
        config = grid.config(of, grid.Run(name, arm["best_rate"], 0), Path())
        restarts, relora = config.arm == "relora", config.relora
        done = (restarts, restarts and relora.prune.clears, restarts and relora.jagged)
        done += (config.arm in LOW_RANK_ARMS and relora.warm_start_updates > 0,)
        assert [mark.strip() == "x" for mark in marks.split("|")[:-1]] == [*done]
        assert (rate, perplexity) == (f"{arm['best_rate']:g}", f"{arm['perplexity']:.1f}")


@pytest.mark.parametrize(
    "study",
    [study_quickstart.get_config(), *map(study_small.get_config, ("main", "controls", "scale"))],
    ids=lambda study: study.name,
)
def test_studies_had_the_settings_of_their_configs(study: grid.Study) -> None:
    saved = json.loads((results.FIGURES / f"{study.name}.json").read_text())
    settings = json.loads(json.dumps({name: page.settings(study.arms[name]) for name in saved["arms"]}))
    assert saved["settings"] == settings and saved["arms"].keys() == study.arms.keys()
    base, own = saved["base"], json.loads(to_json(study.base))
    assert base.pop("relora") | {"peak_lr": 0} == own.pop("relora") | {"peak_lr": 0}  # each arm has its own
    assert base == own


QUICKSTARTS = {arm: quickstart.get_config(arm) for arm in ("full", "lora", "lora_warm", "relora")}
QUICKSTARTS["one_sided_rank32"] = quickstart_one_sided.get_config()


@pytest.mark.parametrize("arm", QUICKSTARTS)
def test_quickstart_trains_what_its_study_found_best(arm: str) -> None:
    run = grid.Run(arm, study("study_quickstart")[arm]["best_rate"], 0)
    best = {key: value for key, value, _ in flatten(grid.config(study_quickstart.get_config(), run, Path()))}
    own = {key: value for key, value, _ in flatten(QUICKSTARTS[arm])}
    differing = {key for key in own if own[key] != best[key]}
    assert differing <= {"name", "train.keep_last", "train.init_from"}


@pytest.mark.parametrize("other", ["lora", "lora_warm"])
def test_quickstart_is_below_lora_by_more_than_the_spread_of_seeds(other: str) -> None:
    arms = study("study_quickstart")
    difference, others = difference_of(arms, other, "relora"), difference_of(arms, other, "relora", first=1)
    spread = max(statistics.stdev(arm["losses"]) for arm in arms.values())
    assert difference.mean > spread
    assert f"{quoted(others)} below `{other}`" in prose()
    assert f"at most {spread:.3f}." in prose() and f"at most {spread:.3f}" in one_line(README.read_text())


SIZES = ("", "@9m", "@larger")
PLANNED = [f"--config.relora.{setting}" for setting in ("restart=one_sided", "rank=256", "alpha=64")]
QUOTED = (  # (study, the arm that is behind, the arm that is ahead)
    ("study_quickstart", "lora_warm", "relora"),
    ("study_quickstart", "lora", "relora"),
    ("study_quickstart", "lora", "relora_cold"),
    ("study_quickstart", "relora", "full"),
    ("study_quickstart", "relora", "one_sided_rank32"),
    ("study_quickstart", "relora", "one_sided_rank32_never"),
    ("study_quickstart", "one_sided_rank32_never", "one_sided_rank32"),
    ("study_quickstart", "lora", "restarts"),
    ("study_quickstart", "restarts", "restarts_reset"),
    ("study_quickstart", "restarts_reset", "relora_cold"),
    ("study_quickstart", "relora_cold", "relora"),
    ("study_quickstart", "relora_late", "relora_cold"),
    ("study_small", "relora_cold", "full"),
    ("study_small", "full", "muon"),
    ("study_small", "scale", "full"),
    ("study_small", "relora", "scale"),
    ("study_small", "lora_warm", "relora"),
    ("study_small", "lora", "relora_cold"),
    ("study_small", "one_sided", "relora"),
    ("study_small", "one_sided_cold", "relora_cold"),
    ("study_small", "one_sided", "one_sided_cold"),
    ("study_small", "relora_cold", "one_sided_rank32_cold"),
    ("study_small", "one_sided_rank32_cold", "full"),
    ("study_small", "one_sided_rank32_cold", "scale"),
    ("study_small", "one_sided_rank32", "scale"),
    ("study_small", "one_sided_rank32", "one_sided_rank32_cold"),
    ("study_small_controls", "one_sided_never", "one_sided"),
    ("study_small_controls", "one_sided_rank32_never", "one_sided_rank32"),
    ("study_small_controls", "one_sided_zero", "one_sided"),
    ("study_small_controls", "one_sided_15", "one_sided"),
    ("study_small_controls", "relora_15", "relora"),
    ("study_small_controls", "one_sided_50", "one_sided"),
    ("study_small_controls", "relora_50", "relora"),
    ("study_small_controls", "one_sided", "one_sided_b2"),
    ("study_small_controls", "relora_b2", "relora"),
    ("study_small_controls", "one_sided_rank2", "relora"),
    ("study_small_controls", "one_sided", "relora"),
    ("study_small_controls", "one_sided_rank8", "relora_rank4"),
    ("study_small_controls", "relora_rank16", "one_sided_rank32"),
    ("study_small_controls", "relora", "relora_rank4"),
    ("study_small_controls", "relora", "relora_rank16"),
    ("study_small_controls", "relora", "one_sided_rank8"),
    ("study_small_controls", "relora", "one_sided_rank12"),
    ("study_small_controls", "relora_rank4", "one_sided_rank12"),
    ("study_small_controls", "one_sided_ratio", "one_sided"),
    ("study_small_controls", "one_sided", "one_sided_orthonormal"),
    ("study_small_scale", "relora@9m", "full@9m"),
    ("study_small_scale", "lora_warm@9m", "relora@9m"),
    ("study_small_scale", "one_sided@9m", "relora@9m"),
    ("study_small_scale", "relora", "one_sided_rank32"),
    ("study_small_scale", "relora@9m", "one_sided_rank32@9m"),
    ("study_small_scale", "relora@9m", "one_sided_rank12@9m"),
    ("study_small_scale", "relora@larger", "full@larger"),
    ("study_small_scale", "lora_warm@larger", "relora@larger"),
    ("study_small_scale", "relora@larger", "one_sided_rank32@larger"),
    ("study_small_scale", "relora@larger", "one_sided_rank12@larger"),
)


def test_text_quotes_the_differences_of_the_studies_and_no_others() -> None:
    text, readme = prose(), one_line(README.read_text())
    of = study("study_quickstart")
    pairs = (("lora", "relora"), ("lora_warm", "relora"), ("one_sided_rank32_never", "one_sided_rank32"))
    given = {quoted(difference_of(of, *pair, first=1)) for pair in pairs}
    for name, behind, ahead in QUOTED:
        difference = difference_of(study(name), behind, ahead)
        assert difference.mean > 0
        given.add(quoted(difference))
        places = [part for part in re.split(r"(?<=[a-z`)])[.:;] ", text) if quoted(difference) in part]
        assert any(f"`{behind}`" in part and f"`{ahead}`" in part for part in places), (behind, ahead)
    figure = re.compile(r"\d\.\d{3} ± \d\.\d{3}")
    assert set(figure.findall(text)) == given >= set(figure.findall(readme))


@pytest.mark.parametrize(
    ("name", "behind", "ahead", "words"),
    [
        ("study_quickstart", "lora_warm", "relora", "{} nats below LoRA with a warm start"),
        ("study_quickstart", "lora", "relora", "{} below LoRA ("),
        ("study_quickstart", "relora", "full", "{} above full rank"),
        ("study_quickstart", "one_sided_rank32_never", "one_sided_rank32", "{} of it by restarts"),
        ("study_small", "relora", "scale", "SCALE, as lean, is {} ahead of ReLoRA"),
    ],
)
def test_readme_says_what_each_of_its_differences_is(name: str, behind: str, ahead: str, words: str) -> None:
    difference = quoted(difference_of(study(name), behind, ahead))
    assert words.format(difference) in one_line(README.read_text())


def closed(name: str, one_sided: str, size: str = "") -> tuple[str, str]:
    """The share of relora's gap that an arm closes, and how much more memory it needs if recomputed."""
    saved = json.loads((results.FIGURES / f"{name}.json").read_text())
    full, relora, arm = (f"{of}{size}" for of in ("full", "relora", one_sided))
    gap, ahead = (difference_of(saved["arms"], relora, other) for other in (full, arm))
    assert ahead.mean > ahead.half_width
    recomputed = totals(saved, "bytes_recomputed")
    return f"{ahead.mean / gap.mean:.0%}", f"{recomputed[arm] / recomputed[relora] - 1:.1%}"


@pytest.mark.parametrize(
    ("name", "size"),
    [("study_quickstart", ""), *(("study_small_scale", size) for size in SIZES)],
)
def test_rank_32_passes_as_a_default_with_fewer_bytes_unless_recomputed(name: str, size: str) -> None:
    saved = json.loads((results.FIGURES / f"{name}.json").read_text())
    full, relora, one_sided = (f"{arm}{size}" for arm in ("full", "relora", "one_sided_rank32"))
    gap, ahead = (difference_of(saved["arms"], relora, other) for other in (full, one_sided))
    assert ahead.mean - ahead.half_width > gap.mean / 4
    assert re.search(f"`{one_sided}`, (which is )?{closed(name, 'one_sided_rank32', size)[0]}", prose())
    kept, recomputed = totals(saved, "bytes"), totals(saved, "bytes_recomputed")
    assert kept[one_sided] < kept[relora] and recomputed[one_sided] > recomputed[relora]


def test_shares_of_the_gap_that_one_sided_closes() -> None:
    share, _ = closed("study_quickstart", "one_sided_rank32")
    wide = [closed("study_small_scale", "one_sided_rank32", size)[0] for size in SIZES]
    rank_12 = [closed("study_small_scale", "one_sided_rank12", size) for size in SIZES]
    shares, more = zip(*rank_12, strict=True)
    readme, text = one_line(README.read_text()), one_line(prose())
    assert f"close {share} of the gap to full rank" in readme
    assert "(after 1,500, {}, {} and {} at three sizes)".format(*wide) in readme
    assert "rank 12 closes {}, {} and {} for {} to {} more memory".format(*shares, more[0], more[2]) in readme
    assert "Rank 12 needs {}, {} and {} more".format(*more) in text
    for size, part in zip(SIZES, shares, strict=True):
        assert f"behind `one_sided_rank12{size}`, {part}" in text
    arms = study("study_small_scale")
    resolved = []
    for size in SIZES:
        gap, ahead = (
            difference_of(arms, f"relora{size}", f"{of}{size}") for of in ("full", "one_sided_rank12")
        )
        resolved += [size] * (ahead.mean - ahead.half_width > gap.mean / 4)
    assert resolved == ["@9m"] and "more than 25% is resolved at 9m only" in text


def test_rank_8_needs_less_than_relora_if_recomputed_and_rank_32_as_much_as_relora_s_16() -> None:
    recomputed = totals(
        json.loads((results.FIGURES / "study_small_controls.json").read_text()), "bytes_recomputed"
    )
    assert recomputed["one_sided_rank8"] < recomputed["relora"] < recomputed["one_sided_rank12"]
    assert recomputed["one_sided_rank12"] < recomputed["relora_rank4"]
    assert recomputed["relora_rank16"] == pytest.approx(recomputed["one_sided_rank32"], rel=0.01)


def totals(saved: dict[str, Any], key: str) -> dict[str, float]:
    return {arm: sum(split.values()) for arm, split in saved[key].items()}


def test_plans_at_350m_are_those_that_the_page_quotes() -> None:
    plans = json.loads((results.ROOT / "benchmarks/scale/350m-h100-1-one_sided.json").read_text())["plans"]
    configs = [
        cli.parse(["plan", f"--config={results.ROOT}/configs/350m.py", *rank])[0] for rank in ([], PLANNED)
    ]
    for plan, config in zip(plans, configs, strict=True):
        count = shapes.count(config)
        assert plan["parameters"] == {"trained": count.trained, "frozen": count.frozen}
        assert (plan["microbatch"], plan["programs"]["low_rank_update"]["remat"]) == (16, "dots")
    relora, one_sided = (plan["programs"]["low_rank_update"]["bytes"]["total"] / 1e9 for plan in plans)
    assert f"{one_sided:.1f} GB at rank 256, beside {relora:.1f} GB" in one_line(prose())
    assert f"--json {' '.join(PLANNED)}\n" in results.PAGE.read_text()


def difference_of(arms: dict[str, Any], behind: str, ahead: str, first: int = 0) -> Difference:
    """How much the loss of one arm is above that of another, over the seeds from `first` on."""
    one, other = (dict(list(enumerate(arms[of]["losses"]))[first:]) for of in (behind, ahead))
    difference = paired(one, other)
    assert difference is not None
    return difference


def quoted(difference: Difference) -> str:
    return f"{difference.mean:.3f} ± {difference.half_width:.3f}"


def prose() -> str:
    """The results page, one line for each paragraph, point or row, without the reports of studies."""
    text = re.sub(f"<!-- study .*?{results.END}", "", results.PAGE.read_text(), flags=re.DOTALL)
    return re.sub(r"\n(?=[^\n|-])(?<!\n\n) *", " ", text)


def one_line(text: str) -> str:
    return " ".join(text.split())
