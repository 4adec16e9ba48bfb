"""Imports a LLaMA, Mistral, Qwen2 or Qwen3 from transformers as a full-rank checkpoint for train.init_from.

    python -m relora_jax.import_hf --input=DIR --output=RUN [--overwrite]

DIR has config.json, one or more safetensors files, and a tokenizer (a warning if it is missing).
RUN gets checkpoints/0, the weights in float32 (lossless for float32, bfloat16 and float16); tokenizer/;
config.py, a config to start training from; config.json and run.json, so that `generate` and `export` can
read RUN. A model that cannot be represented is refused, by name, before anything is written.
--overwrite replaces an older RUN that contains nothing else. Nothing is unpickled or executed.
Exit codes: 0 finished, 2 wrong usage or a model that cannot be imported, 74 data or disk failed.
"""

import shlex
from collections.abc import Sequence
from typing import Any

import jax

from relora_jax import cli, shapes
from relora_jax.hf import importing
from relora_jax.storage.location import local_path


def main(argv: Sequence[str]) -> int:
    """Imports the model and prints the command that trains it; returns the exit code."""
    args = _parse(argv[1:])
    source = local_path(args.input, flag="--input")
    workdir = local_path(args.output, flag="--output").absolute()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed; accelerators may be busy
    model = importing.import_model(source, workdir, overwrite=args.overwrite)
    train = shlex.join(["python", "-m", "relora_jax.train", f"--config={workdir / 'config.py'}"])
    print(f"imported {source} into {workdir}: {shapes.parameters(model):,} parameters; train it with")
    print(f"{train} --text='data/*.jsonl.gz'")
    return 0


def _parse(args: Sequence[str]) -> Any:
    parser = cli.ArgumentParser()
    parser.add_argument("--input", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--overwrite", action="store_true")
    return parser.parse_args(args)


if __name__ == "__main__":
    cli.main(main, __doc__)
