"""Documents -> rows of sequence_length + 1 ids in ArrayRecord, made once and found by what decides them.

    python -m relora_jax.prepare --config=configs/350m.py [--workers=N] [--text='data/*.jsonl.gz']

Blocks of documents become shards, in N processes (0, the default: one for each CPU); stopped or killed, the
same command goes on with the blocks that are missing. `train` prepares small text by itself.
"""

import math
import sys

from relora_jax import cli
from relora_jax.data import prepared
from relora_jax.data.rows import RowStore
from relora_jax.data.stores import How
from relora_jax.data.workers import cpus


def describe(part: str, store: RowStore) -> str:
    """What a store holds, and of how much of its text."""
    manifest = store.manifest
    text = manifest["text"]
    of = f" of {text['of_documents']:,}" if text["of_documents"] is not None else ""
    blocks = f"{len(manifest['shards']):,} block(s) ({text['files']:,} of {text['of_files']:,} files)"
    return (
        f"{part}: {store.rows:,} rows, {store.tokens:,} tokens of {manifest['documents']:,}{of} documents in "
        f"{blocks}: {store.path}"
    )


def main(arguments: list[str]) -> int:
    """Prepare what --config names, whatever its size; the exit code."""
    config, strings = cli.parse(arguments, workers="0")
    workers = cli.count("workers", strings["workers"], at_least=0) or cpus()
    how = How(build_limit_bytes=math.inf, workers=workers, progress=sys.stderr.isatty())
    prepared.check_vocabulary(config, prepared.find_tokenizer(config.data, how))
    found = prepared.prepare(config.data, how)
    for part, store in (("train", found.train), ("validation", found.validation)):
        print(describe(part, store))
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
