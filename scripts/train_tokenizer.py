"""python scripts/train_tokenizer.py --output=FILE.model --config=configs/60m.py [--kind=bpe] [--vocab_size=N]
python scripts/train_tokenizer.py --output=FILE.model --text='data/*.jsonl.gz' [--text_field=text] ...

Trains a SentencePiece model, bpe or unigram, on the train documents of a config or of files of one's own (the
first 100 MB of them). Name it as data.tokenizer afterwards. An existing file is not written over.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.config import DataConfig
from relora_jax.data import prepared
from relora_jax.errors import UserError
from relora_jax.tokenizer import tokenizer

FLAGS = {"kind": "bpe", "vocab_size": "32000", "output": ""}


def main(argv: Sequence[str]) -> int:
    """Trains the model and says what it is; the exit code."""
    if any(word.startswith(("-config", "--config")) for word in argv):
        config, told = cli.parse(argv, **FLAGS)
        data = config.data
    else:
        told = cli.options(argv, text="", text_field="text", **FLAGS)
        if not told["text"]:
            raise UserError("say what to train on: --config=configs/350m.py or --text='data/*.jsonl.gz'")
        data = DataConfig(text=told["text"], text_field=told["text_field"], tokenizer="", sequence_length=1)
    vocab_size, output = (
        cli.count("vocab_size", told["vocab_size"], at_least=1),
        Path(told["output"]).expanduser(),
    )
    if told["kind"] not in ("bpe", "unigram"):
        raise UserError(f"--kind={told['kind']} is not known: bpe or unigram")
    if output.suffix != ".model":
        raise UserError(f"--output={told['output']} is no name of a model: write FILE.model")
    if output.exists():
        raise UserError(f"--output={output} is there already: remove it, or name another file")
    documents = prepared.train_texts(data)
    print(f"reading text and training {vocab_size:,} pieces", file=sys.stderr)
    made = tokenizer.train(documents, kind=told["kind"], vocab_size=vocab_size, path=output)
    print(f"{told['kind']} model of {made.vocab_size:,} pieces: {output} (sha256 {made.sha256})")
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
