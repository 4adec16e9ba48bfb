"""python scripts/results.py STUDY.md ...

Takes the reports of studies, such as runs/study_small/study_small.md, into docs/results.md, each at the line
<!-- study NAME -->, with their pictures in docs/studies/ and their figures in benchmarks/studies/.
"""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.errors import UserError

ROOT = Path(__file__).parents[1]
PAGE, PICTURES, FIGURES = ROOT / "docs/results.md", ROOT / "docs/studies", ROOT / "benchmarks/studies"
END = "<!-- end of the study -->\n"
KINDS = ("rates", "curves", "spectra", "gaps")  # of pictures


def taken(page: str, name: str, report: str) -> str:
    """The page with the report of one study, in place of an earlier one. UserError without its line."""
    start = f"<!-- study {name} -->\n"
    if start not in page:
        raise UserError(f"docs/{PAGE.name} has no line {start.strip()}: add it where the report belongs")
    body = report.split("\n", 1)[1].replace("\n## ", "\n#### ")  # its title is that of the page's section
    body = re.sub(r"\]\((?=[^)/]*\.png\))", "](studies/", body)
    earlier = f"{re.escape(start)}(?:(?:(?!<!-- study).)*?{re.escape(END)})?"
    return re.sub(earlier, lambda _: f"{start}{body.rstrip()}\n\n{END}", page, flags=re.DOTALL)


def main(argv: Sequence[str]) -> int:
    """Takes each report; returns the exit code."""
    for path in map(Path, argv[1:]):
        figures = path.with_suffix(".json")
        if not (path.is_file() and figures.is_file()):
            raise UserError(f"{path} is no report of a study with its JSON beside it: run the study first")
        page = taken(PAGE.read_text(), path.stem, path.read_text())
        for folder in (PICTURES, FIGURES):
            folder.mkdir(exist_ok=True)
        shutil.copy(figures, FIGURES)
        for picture in [path.with_name(f"{path.stem}_{kind}.png") for kind in KINDS]:
            if picture.is_file():
                shutil.copy(picture, PICTURES)
        PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
