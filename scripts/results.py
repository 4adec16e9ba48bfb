"""python scripts/results.py STUDY.md ...

Takes the reports of studies, such as runs/study_small/study_small.md, into docs/results.md, each at the line
<!-- study NAME -->, with their pictures in docs/studies/ and their figures in benchmarks/studies/.
"""

import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, PICTURES, FIGURES = ROOT / "docs/results.md", ROOT / "docs/studies", ROOT / "benchmarks/studies"
END = "<!-- end of the study -->\n"
KINDS = ("rates", "curves", "spectra", "gaps")  # of pictures


def taken(page: str, name: str, report: str) -> str:
    """The page with the report of one study, in place of an earlier one. ValueError without its line."""
    start = f"<!-- study {name} -->\n"
    if start not in page:
        raise ValueError(f"{PAGE.name} has no line {start.strip()}")
    body = report.split("\n", 1)[1].replace("\n## ", "\n#### ")  # its title is that of the page's section
    body = re.sub(r"\]\((?=[^)/]*\.png\))", "](studies/", body)
    earlier = f"{re.escape(start)}(?:(?:(?!<!-- study).)*?{re.escape(END)})?"
    return re.sub(earlier, lambda _: f"{start}{body.rstrip()}\n\n{END}", page, flags=re.DOTALL)


def main(reports: list[str]) -> None:
    """Takes each report."""
    for path in map(Path, reports):
        page = taken(PAGE.read_text(), path.stem, path.read_text())
        for folder in (PICTURES, FIGURES):
            folder.mkdir(exist_ok=True)
        shutil.copy(path.with_suffix(".json"), FIGURES)
        for picture in [path.with_name(f"{path.stem}_{kind}.png") for kind in KINDS]:
            if picture.is_file():
                shutil.copy(picture, PICTURES)
        PAGE.write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
