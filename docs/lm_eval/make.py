"""Writes the two tasks' files, paragraphs.jsonl and endings.jsonl, into this directory.

    python docs/lm_eval/make.py

100 paragraphs of held-out addresses; for each, its beginning with the 12 words that follow and, as the wrong
ending, 12 words from the middle of another.
"""

import json
import random
from pathlib import Path

from relora_jax.data import sotu

HERE = Path(__file__).parent
PARAGRAPHS, WORDS = 100, 12


def main() -> None:
    """Writes the files."""
    texts = [file.read_text() for file in sotu.speeches() if sotu.held_out(file.name)]
    found = [part.strip() for text in texts for part in text.split("\n\n") if 200 < len(part) < 600]
    chance = random.Random(0)
    chosen = chance.sample(found, PARAGRAPHS)
    lines = [{"text": paragraph} for paragraph in chosen]
    (HERE / "paragraphs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    halves = [
        (words[: len(words) // 2], words[len(words) // 2 :][:WORDS]) for words in map(str.split, chosen)
    ]
    lines = []
    for (begin, right), (_, wrong) in zip(halves, halves[1:] + halves[:1], strict=True):
        ends = [" ".join(right), " ".join(wrong)]
        place = chance.randrange(2)
        lines.append({"begin": " ".join(begin), "ends": ends[:: 1 - 2 * place], "right": place})
    (HERE / "endings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
