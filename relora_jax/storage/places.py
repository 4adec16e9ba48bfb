"""The cache directory and TFDS's data directory, read from the environment at each call.

Nothing is created at import.
"""

import os
from pathlib import Path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/relora_jax, else ~/.cache/relora_jax: tokenizers, rows, compiled programs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "relora_jax"


def datasets_dir() -> Path:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets, as in TFDS."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
