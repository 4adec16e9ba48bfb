"""python scripts/train_tokenizer.py --output=FILE.model --config=configs/60m.py [--kind=bpe] [--vocab_size=N]
python scripts/train_tokenizer.py --output=FILE.model --text='data/*.jsonl.gz' [--text_field=text] ...

Trains a SentencePiece model, bpe or unigram, on the train documents of a config or of your own files (on
their first 100 MB). Afterwards, pass its path as data.tokenizer. An existing file is never overwritten.
--skip_bad_documents leaves out documents without text that can be read.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.config import DataConfig
from relora_jax.data import prepared
from relora_jax.data.stores import PrepareOptions
from relora_jax.errors import UserError
from relora_jax.tokenizer import tokenizer

FLAGS: dict[str, str | bool] = {
    "kind": "bpe",
    "vocab_size": "32000",
    "output": "",
    "skip_bad_documents": False,
}


def main(argv: Sequence[str]) -> int:
    """Trains the model and prints a summary; returns the exit code."""
    if any(arg.startswith(("-config", "--config")) for arg in argv):
        config, flags = cli.parse(argv, **FLAGS)
        data = config.data
    else:
        flags = cli.options(argv, text="", text_field="text", **FLAGS)
        if not flags["text"]:
            raise UserError("no text to train on: pass --config=configs/350m.py or --text='data/*.jsonl.gz'")
        data = DataConfig(text=flags["text"], text_field=flags["text_field"], tokenizer="", sequence_length=1)
    vocab_size = cli.count("vocab_size", flags["vocab_size"], at_least=1)
    output, kind = Path(flags["output"]).expanduser(), flags["kind"]
    if kind not in ("bpe", "unigram"):
        raise UserError(f"--kind={kind} must be bpe or unigram")
    if output.suffix != ".model":
        raise UserError(f"--output={flags['output']} must be a file name that ends in .model")
    if output.exists():
        raise UserError(f"--output={output} already exists: remove it, or choose another name")
    options = PrepareOptions(skip_bad_documents=flags["skip_bad_documents"])
    documents = prepared.train_texts(data, options)
    print(f"reading text and training a vocabulary of {vocab_size:,} pieces", file=sys.stderr)
    model = tokenizer.train(documents, kind=kind, vocab_size=vocab_size, path=output)
    print(f"{kind} model of {model.vocab_size:,} pieces: {output} (sha256 {model.sha256})")
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
