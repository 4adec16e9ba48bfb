"""Documents of a block -> rows of S = length + 1 ids, in one of two ways.

concatenate: [d1 eos d2 eos ...] cut every S ids, what is left at the end dropped.
truncate: [d eos] cut at S and filled up with `pad`: one row a document, with its true length.
A document has one EOS, never two: none is added to a text that ends in one, or to one that is empty. Where
the tokenizer has a `bos`, d begins with it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32

PACKINGS = ("concatenate", "truncate")


class Rows(NamedTuple):
    """Rows and how many ids of each are its own."""

    ids: Int32[np.ndarray, "rows S"]
    lengths: Int32[np.ndarray, " rows"]


class Packer:
    """Packs the documents of one block, a batch at a time; `given` counts their tokens, EOS included."""

    def __init__(self, packing: str, *, length: int, eos: int, pad: int, bos: int | None = None) -> None:
        self._size, self._eos, self._pad = length + 1, np.int32(eos), pad
        self._bos = np.array([] if bos is None else [bos], np.int32)
        self._pack = {"concatenate": self._concatenate, "truncate": self._truncate}[packing]
        self._rest = np.empty(0, np.int32)
        self.given = 0

    def add(self, documents: Iterable[Int32[np.ndarray, " _"]]) -> Rows:
        """The rows that are whole now."""
        end = np.array([self._eos])
        ended = [
            np.concatenate([self._bos, ids, end[int(ids[-1] == self._eos) :]])
            for ids in documents
            if len(ids)
        ]
        self.given += sum(map(len, ended))
        return self._pack(ended)

    def _concatenate(self, ended: list[np.ndarray]) -> Rows:
        ids = np.concatenate([self._rest, *ended])
        rows = len(ids) // self._size
        whole, self._rest = np.split(ids, [rows * self._size])
        return Rows(whole.reshape(rows, self._size), np.full(rows, self._size, np.int32))

    def _truncate(self, ended: list[np.ndarray]) -> Rows:
        kept = [ids[: self._size] for ids in ended if len(ids) > 1]  # a row of one id has no target
        rows = np.full((len(kept), self._size), self._pad, np.int32)
        for row, ids in zip(rows, kept, strict=True):
            row[: len(ids)] = ids
        return Rows(rows, np.array([len(ids) for ids in kept], np.int32))
