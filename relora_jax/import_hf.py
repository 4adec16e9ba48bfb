"""A LLaMA of transformers -> a full-rank checkpoint that train.init_from begins with.

    python -m relora_jax.import_hf --input=DIR --output=RUN [--overwrite]

DIR holds config.json, safetensors in one file or several, and a tokenizer (without one there is a warning).
RUN gets checkpoints/0 with the weights in float32, to which float32, bfloat16 and float16 go without loss;
config.json and run.json, so that `generate` and `export` read it as they read a run; tokenizer/; and
config.py, a config to begin with. What cannot be represented is refused by name before anything is
written. --overwrite replaces an older RUN that holds nothing else. Nothing is unpickled or executed.
Exit codes: 0 done, 2 wrong usage or a model that cannot be imported, 74 data or disk failed.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from relora_jax import cli, shapes
from relora_jax.hf import importing


def main(argv: Sequence[str]) -> int:
    """Imports what the command line names and says how to go on; the exit code."""
    words = _parse(argv[1:])
    source, workdir = words.input.expanduser(), words.output.expanduser().absolute()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed, and accelerators may be at work
    model = importing.import_model(source, workdir, overwrite=words.overwrite)
    train = shlex.join(["python", "-m", "relora_jax.train", f"--config={workdir / 'config.py'}"])
    print(f"{source} is in {workdir}: {shapes.parameters(model):,} parameters; go on with")
    print(f"{train} --text='data/*.jsonl.gz'")
    return 0


def _parse(words: Sequence[str]) -> Any:
    parser = cli.Words()
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(words)


if __name__ == "__main__":
    cli.main(main, __doc__)
