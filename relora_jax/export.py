"""A run's checkpoint -> a directory that transformers loads: LlamaForCausalLM, its tokenizer, its settings.

    python -m relora_jax.export --workdir=RUN --output=DIR [--update=U] [--dtype=bfloat16] [--adapter]
                                [--tokenizer=PATH] [--overwrite]

The newest checkpoint, or that of --update, of any arm, its live factors merged. --dtype: float32 (default),
as the run keeps its weights, or bfloat16, rounded to nearest. --adapter: the base kernels without the live
factors, and these beside them in DIR/adapter, in PEFT's format. --tokenizer: where the run's own lies now,
if it was moved. DIR is written aside and takes its name when it is whole; --overwrite replaces an older
export. A SentencePiece model that no tokenizer.json gives the same ids goes out as it is, with a warning.
Exit codes: 0 done, 2 wrong usage, 74 data or disk failed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from relora_jax import cli
from relora_jax.hf import exporting


def main(argv: Sequence[str]) -> int:
    """Exports what the command line names and says where it lies; the exit code."""
    words = _parse(argv[1:])
    jax.config.update("jax_platforms", "cpu")  # all is done on the host, and accelerators may be at work
    workdir, output = words.workdir.expanduser(), words.output.expanduser().absolute()
    options = {"dtype": words.dtype, "adapter": words.adapter, "overwrite": words.overwrite}
    made = exporting.export(workdir, output, update=words.update, tokenizer=words.tokenizer, **options)
    what = "its live factors beside it" if words.adapter else "its live factors merged"
    what = what if made.low_rank else "full-rank"
    print(f"update {made.update} of {workdir}, {what}, in {words.dtype}: {output}")
    return 0


def _parse(words: Sequence[str]) -> Any:
    parser = cli.Words()
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--update", type=int)
    parser.add_argument("--dtype", choices=exporting.DTYPES, default="float32")
    parser.add_argument("--tokenizer", default="")
    parser.add_argument("--adapter", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    cli.main(main, __doc__)
