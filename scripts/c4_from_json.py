"""python scripts/c4_from_json.py --input='c4/c4-*.json.gz'

Builds the TFDS dataset c4/en under TFDS_DATA_DIR (ArrayRecord, without TensorFlow) from files of JSON lines
with `text`, `timestamp` and `url`: one shard per file, in the validation split if its name has `validation`.
`prepare --text=... --validation_text=...` reads the same files directly and in several processes: use this
script only if you want the dataset itself.
"""

import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from relora_jax import cli
from relora_jax.data import compression, formats, json_lines, patterns
from relora_jax.errors import UserError
from relora_jax.storage import places

FEATURES = ("text", "timestamp", "url")


def examples(file: patterns.TextFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (key, features) of each line, in order. UserError names an invalid line."""
    with file.open("rb") as raw:
        number = 0
        try:
            for number, line in json_lines.lines(compression.opened(raw, formats.file_type(file.name)[1])):
                row = json_lines.parse(line)
                if not isinstance(row.get("text"), str):
                    raise json_lines.Broken("without a `text` string")
                yield f"{file.name}:{number}", {name: str(row.get(name, "")).encode() for name in FEATURES}
        except compression.Damaged as error:
            raise UserError(f"{file} is damaged after line {number} ({error}): copy it again") from error
        except json_lines.Broken as error:
            raise UserError(f"{file}, line {number} is {error}: fix the file") from error
        except UnicodeEncodeError as error:
            raise UserError(f"{file}, line {number} is half of a surrogate pair: fix the file") from error


def main(argv: Sequence[str]) -> int:
    """Builds the dataset and prints its path; returns the exit code."""
    pattern = cli.options(argv, input="")["input"]
    if not pattern:
        raise UserError("--input is missing: pass a pattern such as 'c4/c4-*.json.gz'")
    files = patterns.matching(pattern, setting="--input")
    import tensorflow_datasets as tfds

    class C4(tfds.core.ShardBasedBuilder, skip_registration=True):
        """One shard per file, in the order of the file names."""

        name = "c4"
        VERSION = tfds.core.Version("3.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]
        code_path = None

        def _info(self) -> tfds.core.DatasetInfo:
            texts = tfds.features.FeaturesDict({name: tfds.features.Text() for name in FEATURES})
            return tfds.core.DatasetInfo(builder=self, features=texts, disable_shuffling=True)

        def _shard_iterators_per_split(self, dl_manager: object) -> dict[str, list[Any]]:
            splits = {"train": list[Any](), "validation": list[Any]()}
            for file in files:
                splits["validation" if "validation" in file.name else "train"].append(partial(examples, file))
            return {split: shards for split, shards in splits.items() if shards}

    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints the path itself
        builder = C4(data_dir=places.datasets_dir(), file_format="array_record")
        if builder.data_path.exists():  # TFDS would silently keep it
            raise UserError(f"{builder.data_dir} already exists: remove it to build it from these files")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    counts = ", ".join(f"{split.num_examples:,} in {name}" for name, split in builder.info.splits.items())
    print(f"{builder.data_dir}: {counts}", file=sys.stdout)
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
