"""Tokenizes text once into a cache of rows of sequence_length + 1 ids, stored as ArrayRecord shards.

    python -m relora_jax.prepare --config=configs/350m.py [--workers=N] [--text='data/*.jsonl.gz']
                                 [--text_field=text] [--validation_text='held-out/*.jsonl.gz']
                                 [--skip_bad_documents] [--workdir=gs://bucket/run]

N processes (0, the default: one per CPU) turn blocks of documents into shards; if stopped or killed, the
same command continues with the missing blocks. `train` prepares small text itself. A document without text
that can be read ends it; with --skip_bad_documents it is left out and counted. With --workdir, the rows are
also copied to the run's directory in an object store, from which each machine that trains it copies them.
Exit codes: 0 done, 2 invalid setting or missing text, 74 data or disk failed.
"""

import math
import sys
from collections.abc import Sequence

from relora_jax import cli
from relora_jax.data import prepared
from relora_jax.data.copies import copies_of, publish
from relora_jax.data.rows import RowStore
from relora_jax.data.stores import PrepareOptions
from relora_jax.data.workers import cpus
from relora_jax.errors import UserError
from relora_jax.storage.location import any_path


def describe(part: str, store: RowStore, *, with_skipped: bool) -> str:
    """One line with the rows and tokens of a store and how much of its text they cover."""
    manifest = store.manifest
    text = manifest["text"]
    total = f" of {text['of_documents']:,}" if text["of_documents"] is not None else ""
    skipped = f" ({n:,} skipped as bad)" if (n := text.get("skipped", 0)) and with_skipped else ""
    documents = f"{manifest['documents']:,}{total} documents{skipped}"
    blocks = f"{len(manifest['shards']):,} block(s) ({text['files']:,} of {text['of_files']:,} files)"
    return f"{part}: {store.rows:,} rows, {store.tokens:,} tokens of {documents} in {blocks}: {store.path}"


def main(argv: Sequence[str]) -> int:
    """Prepares the text of --config, whatever its size; returns the exit code."""
    config, values = cli.parse(argv, workdir="", workers="0", skip_bad_documents=False)
    copies = copies_of(any_path(values["workdir"]))
    if values["workdir"] and not copies:
        raise UserError(f"--workdir={values['workdir']} is local, where rows are not copied to: omit it")
    options = PrepareOptions(
        build_limit_bytes=math.inf,
        workers=cli.count("workers", values["workers"], at_least=0) or cpus(),
        progress=sys.stderr.isatty(),
        skip_bad_documents=values["skip_bad_documents"],
        copies=copies,
    )
    prepared.check_vocabulary(config, prepared.find_tokenizer(config.data, options))
    stores = prepared.prepare(config.data, options)
    for part, store in (("train", stores.train), ("validation", stores.validation)):
        is_held_out = part == "validation" and config.data.text and not config.data.validation_text
        print(describe(part, store, with_skipped=not is_held_out))  # once for each text
    if copies:
        publish((stores.train, stores.validation), copies)
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
