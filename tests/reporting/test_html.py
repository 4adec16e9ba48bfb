"""html: the page is one file that fetches nothing, and text from a run stays text."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from relora_jax.reporting import comparison, html, page
from relora_jax.storage import atomic
from tests.support.reports import figures, make, rows  # noqa: F401  (a fixture)

HOSTILE = "<script>x</script> <b>y <img src=z.png> **b** _e_ `c` ![i](http://j/k.png) [l](m) | \\ &amp; a_b"
LOADING = {"script", "link", "iframe", "object", "embed", "base", "video", "audio", "source", "svg", "form"}
PREFIX = "data:image/png;base64,"


class Page(HTMLParser):
    """A page's tags in order, their attributes, and the text between them."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data

    def pictures(self) -> list[bytes]:
        sources = [value or "" for name, value in self.attributes if name == "src"]
        assert all(source.startswith(PREFIX) for source in sources)
        return [base64.b64decode(source.removeprefix(PREFIX)) for source in sources]


def report_of(workdir: Path) -> Page:
    return Page(page.write(workdir).with_suffix(".html"))


def run_with_text(text: str, workdir: Path) -> Path:
    """A run with `text` wherever the files of a run hold free text."""
    samples = [{"kind": "sample", "update": u, "prompt": text, "text": text} for u in (0, 400)]
    workdir = make(workdir, lines=[*rows(), *samples])
    for name, changes in {
        "config.json": {"name": text},
        "run.json": {"devices": [text], "versions": {text: text}, "rows": {"train": {"text": text[:20]}}},
    }.items():
        file = workdir / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2))
    return workdir


def test_page_embeds_its_pictures_and_fetches_nothing(tmp_path: Path) -> None:
    report = report_of(make(tmp_path))
    files = re.findall(r"!\[.*\]\((.*)\)", (tmp_path / "report.md").read_text())
    assert len(files) == 3 and report.pictures() == [(tmp_path / name).read_bytes() for name in files]
    assert (
        not LOADING & set(report.tags)
        and not {"href", "srcset", "background"} & dict(report.attributes).keys()
    )
    assert "url(" not in html.STYLE and "@import" not in html.STYLE
    assert ("content", html.POLICY) in report.attributes and html.POLICY.startswith("default-src 'none'; ")


def test_page_declares_its_charset_viewport_and_title(tmp_path: Path) -> None:
    report = report_of(run_with_text("Größe <1>", tmp_path))
    assert ("charset", "utf-8") in report.attributes
    assert ("content", "width=device-width, initial-scale=1") in report.attributes
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert source.startswith("<!doctype html>") and "<title>Größe &lt;1&gt;, arm relora</title>" in source


def test_tables_samples_and_config_are_shown(tmp_path: Path) -> None:
    samples = [{"kind": "sample", "update": 0, "prompt": "To be,\n", "text": "or not\nto be"}]
    report = report_of(make(tmp_path, lines=[*rows(), *samples]))
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<td><b>To be,<br></b>or not<br>to be</td>" in source
    assert "<td>frozen parameters</td>\n<td>7,654,321</td>" in source
    folded = report.tags[report.tags.index("details") : report.tags.index("/details")]
    assert folded == ["details", "summary", "/summary", "pre", "code", "/code", "/pre"]
    assert (tmp_path / "config.json").read_text().strip() in report.text


def test_text_from_a_run_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures) -> None:  # noqa: F811
    def parsed(text: str, name: str) -> Page:
        def failing(workdir: Path) -> list[int]:
            raise Exception(text)

        monkeypatch.setattr("relora_jax.checkpoint.saved.updates_saved", failing)
        return report_of(run_with_text(text, tmp_path / name))

    hostile = parsed(HOSTILE, "hostile")
    assert hostile.tags == parsed("plain", "plain").tags
    # title, heading, device, name and number of a version, why a section is missing, two prompts, two texts
    assert hostile.text.count(HOSTILE) == 10


def test_comparison_is_one_file_too_and_run_names_are_escaped(tmp_path: Path) -> None:
    def parsed(name: str, text: str) -> Page:
        runs = [run_with_text(t, tmp_path / name / t) for t in (text, "other")]
        return Page(comparison.write(runs, tmp_path / name / "all of them.md").with_suffix(".html"))

    name = HOSTILE.replace("/", "")
    hostile = parsed("1", name)
    assert hostile.tags == parsed("2", "plain").tags
    assert hostile.pictures() == [(tmp_path / "1" / "all of them.png").read_bytes()]
    assert not LOADING & set(hostile.tags)
    assert f"{name} / other: train text {name[:20]} / other" in hostile.text
    assert hostile.text.count(name) == 2


def test_report_html_is_complete_before_report_md_exists(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    figures,  # noqa: F811
) -> None:
    def interrupt(temporary: Path, path: Path) -> None:
        raise KeyboardInterrupt

    workdir, publish, published = make(tmp_path), atomic.publish, []
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            page.write(workdir)
    assert not (workdir / "report.html").exists() and not (workdir / "report.md").exists()
    monkeypatch.setattr(atomic, "publish", lambda *paths: (published.append(paths[1].name), publish(*paths)))
    page.write(workdir)
    assert published == ["report.html", "report.md"]
