"""Evaluates a run's checkpoint: token-weighted loss and perplexity over the first rows of a split.

    python -m relora_jax.evaluate --workdir=RUN [--FLAG=VALUE ...]

Nothing is written into RUN, which may still be training.

--update=U                 the checkpoint (default: the newest)
--split=SPLIT              validation (default) or train of the run, or any split of its TFDS
                           dataset, such as "test" or "validation[:10%]"
--tokens=N                 32768, 500k, 10M or 1B (default: the run's train.eval_tokens)
--microbatch=N             default: the run's
--text=PATTERN             the run's text files if they were moved, or the text to evaluate an
                           imported model on
--validation_text=PATTERN  with --text: the run's held-out files, if it has any
--tokenizer=PATH           the run's tokenizer, if it was moved
--json                     print the result as JSON
--coordinator, --processes, --process, --heartbeat: as in `train`

Exit codes: 0 finished, 2 wrong usage or nothing to evaluate, 74 data or disk failed.
"""

import dataclasses
import json
import math
import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from jax.sharding import Mesh
from tqdm import tqdm

from relora_jax import cli
from relora_jax.config import Config
from relora_jax.data import batches
from relora_jax.errors import UserError
from relora_jax.run import restored
from relora_jax.run.restored import OWN_SPLITS
from relora_jax.storage.location import any_path
from relora_jax.training import processes
from relora_jax.training.evaluation import evaluate
from relora_jax.training.program import Program, enable_compilation_cache

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def main(argv: Sequence[str]) -> int:
    """Evaluates the checkpoint and prints one line; returns the exit code."""
    args = _parse(argv[1:])
    with processes.joined(vars(args)):
        return _evaluate(args)


def _evaluate(args: Any) -> int:
    workdir, split = any_path(args.workdir), args.split
    config = restored.config_of(workdir)
    if args.text:
        text = {"text": args.text, "validation_text": args.validation_text or ""}
        config.data = dataclasses.replace(config.data, **text)
    elif args.validation_text:
        raise UserError(f"--validation_text={args.validation_text} needs --text: pass both")
    if config.data.text and split not in OWN_SPLITS:
        own = " and ".join(OWN_SPLITS)
        raise UserError(f"--split={split}: data.text of {workdir} has only the splits {own}")
    u = restored.update_of(workdir, args.update)
    mesh = restored.mesh_of(config)
    microbatch = _microbatch(config, args.microbatch, mesh)
    tokenizer = restored.tokenizer_of(workdir, config, args.tokenizer)
    enable_compilation_cache()
    program = Program(config, mesh)
    # before the rows are prepared: a run that is still training deletes old checkpoints
    state = restored.model_of(workdir, u, config, program)
    store = restored.rows_of(workdir, config.data, tokenizer, split)
    size = {"eval_tokens": args.tokens or config.train.eval_tokens}
    rows = batches.validation_rows(store, **size)
    stream = batches.validation_batches(
        store,
        **size,
        microbatch=microbatch,
        sharding=program.eval_rows,
        across_documents=config.data.attend_across_documents,
    )
    bar = {"desc": split, "unit": " batches", "total": -(-rows // microbatch), "leave": False}
    hidden = None if processes.is_writer() else True  # None: unless it is a terminal
    result = evaluate(program, state, iter(tqdm(stream, **bar, disable=hidden)))
    if not processes.is_writer():
        return 0
    if args.json:
        values = {key: value if math.isfinite(value) else None for key, value in result._asdict().items()}
        about = {"workdir": str(workdir), "arm": config.arm, "update": u, "split": split}
        print(json.dumps(about | values | {"rows": rows, "rows_of_split": store.rows}))
    else:
        part = "the whole split" if rows == store.rows else f"{rows:,} of the split's {store.rows:,} rows"
        print(
            f"update {u} of {workdir}: {split} loss {result.loss:.4f} nats, "
            f"perplexity {result.perplexity:,.1f} over {result.tokens:,} tokens, {part}"
        )
    return 0


def _parse(args: Sequence[str]) -> Any:
    parser = cli.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--update", type=int)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--tokens", type=_count)
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--text", type=_not_empty)
    parser.add_argument("--validation_text", type=_not_empty)
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--json", action="store_true")
    for name, default in processes.FLAGS.items():
        parser.add_argument(f"--{name}", default=default)
    return parser.parse_args(args)


def _not_empty(text: str) -> str:
    """The argument, unless it is empty, as an unset shell variable would be."""
    if not text:
        raise ArgumentTypeError("the value is empty: write a pattern of files, or omit the flag")
    return text


def _count(text: str) -> int:
    """A plain number, or one with the suffix k, M or B: "1.5M" is 1,500,000."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)([kMB]?)", text)
    number = Decimal(match[1]) * _UNITS[match[2]] if match else Decimal(0)
    if number < 1 or number % 1:
        raise ArgumentTypeError(f"{text!r} is not a number of tokens: write 32768, 500k, 10M or 1B")
    return int(number)


def _microbatch(config: Config, requested: int | None, mesh: Mesh) -> int:
    """The requested one, or the run's own, rounded up to a multiple of the devices that share its rows."""
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if requested is None:
        return -(-config.train.microbatch // devices) * devices
    if requested < 1 or requested % devices:
        raise UserError(f"--microbatch={requested} must be a multiple of the {devices} devices that share it")
    return requested


if __name__ == "__main__":
    cli.main(main, __doc__, leave=processes.leave)
