"""The cache directory and TFDS's data directory, read from the environment at each call.

Nothing is created at import.
"""

import os
from pathlib import Path

from relora_jax.storage.location import local_path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/relora_jax, else ~/.cache/relora_jax: tokenizers, rows, compiled programs."""
    variable = "XDG_CACHE_HOME"
    return local_path(os.environ.get(variable) or "~/.cache", flag=variable) / "relora_jax"


def datasets_dir() -> Path:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets, as in TFDS."""
    variable = "TFDS_DATA_DIR"
    return local_path(os.environ.get(variable) or "~/tensorflow_datasets", flag=variable)
