"""Packs the documents of a block into rows of S = length + 1 ids.

concatenate: [d1 eos d2 eos ...] cut every S ids, the remainder at the end dropped.
truncate: [d eos] cut at S and padded with `pad`: one row per document, with its true length.
A document has exactly one EOS: none is added to a text that already ends in one, or to an empty text. If the
tokenizer has a `bos`, d starts with it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

PACKINGS = ("concatenate", "truncate")


class Rows(NamedTuple):
    """Rows of ids and their true lengths (without padding)."""

    ids: Int32[np.ndarray, "rows S"]
    lengths: Int32[np.ndarray, " rows"]


class Packer:
    """Packs the documents of one block, a batch at a time; `tokens` counts all of their ids, EOS included."""

    def __init__(self, packing: str, *, length: int, eos: int, pad: int, bos: int | None = None) -> None:
        self._size, self._eos, self._pad = length + 1, np.int32(eos), pad
        self._bos = np.array([] if bos is None else [bos], np.int32)
        self._pack = {"concatenate": self._concatenate, "truncate": self._truncate}[packing]
        self._rest = np.empty(0, np.int32)
        self.tokens = 0

    def add(self, documents: Iterable[Int32[np.ndarray, " _"]]) -> Rows:
        """The rows that these documents complete."""
        end = np.array([self._eos])
        sequences = [
            np.concatenate([self._bos, ids, end[int(ids[-1] == self._eos) :]])
            for ids in documents
            if len(ids)
        ]
        self.tokens += sum(map(len, sequences))
        return self._pack(sequences)

    def _concatenate(self, sequences: list[np.ndarray]) -> Rows:
        ids = np.concatenate([self._rest, *sequences])
        rows = len(ids) // self._size
        complete, self._rest = np.split(ids, [rows * self._size])
        return Rows(complete.reshape(rows, self._size), np.full(rows, self._size, np.int32))

    def _truncate(self, sequences: list[np.ndarray]) -> Rows:
        truncated = [ids[: self._size] for ids in sequences if len(ids) > 1]  # a row of one id has no target
        rows = np.full((len(truncated), self._size), self._pad, np.int32)
        for row, ids in zip(rows, truncated, strict=True):
            row[: len(ids)] = ids
        return Rows(rows, np.array([len(ids) for ids in truncated], np.int32))
