"""Token-weighted loss and perplexity over the first rows of a split: of a run as it goes, or of a checkpoint.

    python -m relora_jax.evaluate --workdir=RUN [--update=U] [--split=validation] [--tokens=10M]
                                  [--microbatch=N] [--text='data/*.jsonl.gz'] [--validation_text=PATTERN]
                                  [--tokenizer=PATH] [--json]

evaluates the newest checkpoint of a run, or that of --update. --split: `validation` or `train`, the run's
own, or a split of its dataset in TFDS's words ("test", "validation[:10%]"). --text: where the run's own text
lies now, or what an imported model is evaluated on; --validation_text beside it: where its files of held-out
text lie, if it has such. --tokenizer: where the run's own lies now, if it was moved. Nothing is written into
RUN, which may still be training.
Without --tokens (10M, 500k, 32768) and --microbatch, as the run evaluates itself.
Exit codes: 0 done, 2 wrong usage or nothing there to evaluate, 74 data or disk failed.
"""

import dataclasses
import json
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from relora_jax import cli
from relora_jax.config import Config
from relora_jax.data import batches
from relora_jax.errors import UserError
from relora_jax.run import restored
from relora_jax.run.restored import OWN_SPLITS
from relora_jax.training.evaluation import evaluate
from relora_jax.training.program import Program, keep_compiled

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def main(argv: Sequence[str]) -> int:
    """Evaluates what the command line names and says the result in one line; the exit code."""
    words = _parse(argv[1:])
    place, split = words.workdir.expanduser(), words.split
    config = restored.config_of(place)
    if words.text:
        text = {"text": words.text, "validation_text": words.validation_text or ""}
        config.data = dataclasses.replace(config.data, **text)
    elif words.validation_text:
        raise UserError(f"--validation_text={words.validation_text} goes with --text: give both")
    if config.data.text and split not in OWN_SPLITS:
        own = " and ".join(OWN_SPLITS)
        raise UserError(f"--split={split}: data.text of {place} has the splits {own} alone")
    u = restored.update_of(place, words.update)
    microbatch = _microbatch(config, words.microbatch)
    tokenizer = restored.tokenizer_of(place, config, words.tokenizer)
    keep_compiled()
    program = Program(config, restored.mesh_of(config))
    # before rows are made: a run that goes on deletes old checkpoints
    state = restored.model_of(place, u, config, program)
    store = restored.rows_of(place, config.data, tokenizer, split)
    size = {"eval_tokens": words.tokens or config.train.eval_tokens}
    rows = batches.validation_rows(store, **size)
    found = batches.validation_batches(
        store,
        **size,
        microbatch=microbatch,
        sharding=program.eval_rows,
        across_documents=config.data.attend_across_documents,
    )
    bar = {"desc": split, "unit": " batches", "total": -(-rows // microbatch), "leave": False}
    result = evaluate(program, state, iter(tqdm(found, **bar, disable=None)))
    if words.json:
        values = {key: value if math.isfinite(value) else None for key, value in result._asdict().items()}
        about = {"workdir": str(place), "arm": config.arm, "update": u, "split": split}
        print(json.dumps(about | values | {"rows": rows, "rows_of_split": store.rows}))
    else:
        part = "the whole split" if rows == store.rows else f"{rows:,} of the split's {store.rows:,} rows"
        print(
            f"update {u} of {place}: {split} loss {result.loss:.4f} nats, "
            f"perplexity {result.perplexity:,.1f} over {result.tokens:,} tokens, {part}"
        )
    return 0


def _parse(words: Sequence[str]) -> Any:
    parser = cli.Words()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--update", type=int)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--tokens", type=_count)
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--text", type=_named)
    parser.add_argument("--validation_text", type=_named)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def _named(text: str) -> str:
    """A name that is not empty, as that of a variable of the shell that is not set would be."""
    if not text:
        raise ArgumentTypeError("it names nothing: write a pattern of files, or leave it out")
    return text


def _count(text: str) -> int:
    """A plain number, or one of k, M or B: "1.5M" is 1,500,000."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([kMB]?)", text)
    number = Decimal(match[1]) * _UNITS[match[2]] if match else Decimal(0)
    if number < 1 or number % 1:
        raise ArgumentTypeError(f"{text!r} is no number of tokens: write 32768, 500k, 10M or 1B")
    return int(number)


def _microbatch(config: Config, asked: int | None) -> int:
    """The run's own; where the devices here cannot share its rows, filled up."""
    devices = jax.device_count()
    if asked is None:
        return -(-config.train.microbatch // devices) * devices
    if asked < 1 or asked % devices:
        raise UserError(f"--microbatch={asked} must be a multiple of the number of devices here, {devices}")
    return asked


if __name__ == "__main__":
    cli.main(main, __doc__)
