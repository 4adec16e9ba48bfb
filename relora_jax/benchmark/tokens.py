"""The ids that every column computes: uniform over the vocabulary, the same in JAX and in PyTorch."""

import numpy as np


def synthetic_ids(*, vocab_size: int, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length + 1], always the same."""
    return np.random.default_rng(0).integers(0, vocab_size, (rows, length + 1)).astype(np.int32)
