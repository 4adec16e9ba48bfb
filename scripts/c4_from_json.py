"""python scripts/c4_from_json.py --input='c4/c4-*.json.gz' [--workers=N] [--version=3.1.0] [--skip_broken]

Makes the TFDS dataset c4/en under TFDS_DATA_DIR (ArrayRecord, without TensorFlow) of files of JSON lines with
`text`, `timestamp`, `url`: a shard for each file, `validation` in its name or not telling the split, in N
processes (0, the default: one for each CPU). The same command goes on where it was stopped or killed. A
broken line or file ends it with its name, or is left out and counted with --skip_broken.
"""

import sys
from collections.abc import Sequence

from relora_jax import cli
from relora_jax.data import c4, workers


def main(argv: Sequence[str]) -> int:
    """Makes the dataset and says what it holds; the exit code."""
    told = cli.options(argv, input="", workers="0", version=c4.VERSION, skip_broken=False)
    processes = cli.count("workers", told["workers"], at_least=0) or workers.cpus()
    files = c4.find(told["input"])
    path, shards = c4.build(
        files, version=told["version"], processes=processes, skip_broken=told["skip_broken"]
    )
    for place in [place for shard in shards for place in shard.named]:
        print(place, file=sys.stderr)
    broken = [shard.broken for shard in shards if shard.broken]
    if broken:
        print(
            f"left out: {sum(broken):,} broken lines in {len(broken):,} of {len(files):,} files",
            file=sys.stderr,
        )
    documents = sum(shard.documents for shard in shards)
    print(f"{documents:,} documents of {len(files):,} files in {path}")
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
