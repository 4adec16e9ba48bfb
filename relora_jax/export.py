"""Exports a run's checkpoint to a directory that transformers loads: the model and its tokenizer.

    python -m relora_jax.export --workdir=RUN --output=DIR [--FLAG=VALUE ...]

Any arm can be exported. DIR only appears once it is complete.

--update=U          the checkpoint (default: the newest)
--dtype=DTYPE       float32 (default), as in the checkpoint, or bfloat16, rounded to nearest
--adapter           write the live factors to DIR/adapter, in PEFT's format, instead of merging them
--base_name=NAME    what the adapter names as its base model (default: .., the directory above it)
--tokenizer=PATH    the run's tokenizer, if it was moved
--overwrite         replace an older export in DIR

A SentencePiece model is copied as it is, with a warning, if no tokenizer.json gives the same ids.
Exit codes: 0 finished, 2 wrong usage, 74 data or disk failed.
"""

from collections.abc import Sequence
from typing import Any

import jax

from relora_jax import cli
from relora_jax.hf import exporting
from relora_jax.storage.location import any_path, local_path


def main(argv: Sequence[str]) -> int:
    """Exports the checkpoint and prints the path; returns the exit code."""
    args = _parse(argv[1:])
    jax.config.update("jax_platforms", "cpu")  # all work is on the host; accelerators may be busy
    workdir, output = any_path(args.workdir), local_path(args.output, flag="--output").absolute()
    options = {"dtype": args.dtype, "adapter": args.adapter, "base_name": args.base_name}
    options["overwrite"] = args.overwrite
    result = exporting.export(workdir, output, update=args.update, tokenizer=args.tokenizer, **options)
    factors = "its live factors in an adapter" if args.adapter else "its live factors merged"
    content = factors if result.low_rank else "full-rank"
    print(f"update {result.update} of {workdir}, {content}, in {args.dtype}: {output}")
    return 0


def _parse(args: Sequence[str]) -> Any:
    parser = cli.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--update", type=int)
    parser.add_argument("--dtype", choices=exporting.DTYPES, default="float32")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--base_name", default=exporting.BASE_NAME)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(args)


if __name__ == "__main__":
    cli.main(main, __doc__)
