"""What a run wrote at its first and at its newest evaluation, side by side, in Markdown."""

import re

from relora_jax.config import SAMPLE_TEMPERATURE, SAMPLE_TOP_P
from relora_jax.run.record import Run

# Signs that Markdown or HTML may read as more than themselves; an underscore inside a word is none.
SIGNS = r"[\\`*~\[\]<>&|$]|(?<![^\W_])_|_(?![^\W_])"
NOTE = f"""\
How the model goes on from beginnings of held-out text, in bold: the same beginnings and the same chances at
each evaluation. Temperature {SAMPLE_TEMPERATURE:g}; among the fewest pieces whose probabilities reach \
{SAMPLE_TOP_P:.0%}.
"""


def section(run: Run) -> list[str]:
    """The section; nothing where the run has written no samples."""
    found: dict[int, list[str]] = {}
    for row in run.of("sample"):
        cell = f"<b>{shown(row['prompt'])}</b>{shown(row['text'])}"
        found.setdefault(row["update"], []).append(cell)
    if not found:
        return []
    columns = sorted({min(found), max(found)})
    table = [[f"after {update:,} updates" for update in columns], ["---"] * len(columns)]
    table += map(list, zip(*(found[update] for update in columns), strict=False))
    return ["\n".join(["## Samples\n", NOTE, *(f"| {' | '.join(line)} |" for line in table), ""])]


def shown(text: str) -> str:
    """A cell that shows the text: nothing of it is Markdown or HTML, or moves what stands beside it."""
    printed = "".join(sign if sign.isprintable() or sign == "\n" else " " for sign in text)
    return re.sub(SIGNS, lambda sign: f"&#{ord(sign[0])};", printed).replace("\n", "<br>")
