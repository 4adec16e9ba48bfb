"""The Samples section of a report: the continuations of the first and newest evaluation, side by side."""

import re

from relora_jax.config import SAMPLE_TEMPERATURE, SAMPLE_TOP_P
from relora_jax.run.record import Run

# Characters special to Markdown or HTML; an underscore inside a word is not.
SPECIAL = r"[\\`*~\[\]<>&|$]|(?<![^\W_])_|_(?![^\W_])"
ENDED = " <i>(the text ends here)</i>"  # the model's first piece was eos
NOTE = f"""\
How the model continues prompts (in bold) from held-out text. Every evaluation uses the same prompts
and the same random keys, with temperature {SAMPLE_TEMPERATURE:g} and top-p {SAMPLE_TOP_P:g}.
"""


def section(run: Run) -> list[str]:
    """The section as a one-item list; empty if the run has no samples yet."""
    cells: dict[int, list[str]] = {}
    for row in run.of("sample"):
        cell = f"<b>{escape(row['prompt'])}</b>{escape(row['text']) or ENDED}"
        cells.setdefault(row["update"], []).append(cell)
    if not cells:
        return []
    updates = sorted({min(cells), max(cells)})
    table = [[f"after {update:,} updates" for update in updates], ["---"] * len(updates)]
    table += map(list, zip(*(cells[update] for update in updates), strict=False))
    return ["\n".join(["## Samples\n", NOTE, *(f"| {' | '.join(line)} |" for line in table), ""])]


def escape(text: str) -> str:
    """Text for one table cell: Markdown and HTML escaped, control characters as spaces, newlines as <br>."""
    printable = "".join(char if char.isprintable() or char == "\n" else " " for char in text)
    return re.sub(SPECIAL, lambda match: f"&#{ord(match[0])};", printable).replace("\n", "<br>")
