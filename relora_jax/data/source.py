"""Text as blocks: BLOCK_DOCUMENTS documents of one input file, one after another; the last may hold fewer.

A block is packed by itself, so a row depends on its own block alone: neither on the workers nor on files
that come later.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

# About 31M tokens, 65 MB and half a minute of C4: small enough to lose, and few enough files (6,144 for all
# of C4, 430 for 12B tokens) to be open at once.
BLOCK_DOCUMENTS = 65_536
CHUNK_DOCUMENTS = 128  # documents in memory at a time


class Stripe(NamedTuple):
    """Blocks first, first + step, first + 2 step, ... of an input file: what one worker takes at a time."""

    file: int
    first: int
    step: int

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and block % self.step == self.first


class Chunk(NamedTuple):
    """Some documents of a block; `size` of the source's `size` lies behind them."""

    texts: list[str]
    size: float


@runtime_checkable
class Source(Protocol):
    """Text that `prepare` reads; it is sent to the worker processes."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    @property
    def files(self) -> int:
        """How many input files there are."""
        ...

    @property
    def documents(self) -> int | None:
        """How many documents; None where only reading tells."""
        ...

    @property
    def size(self) -> float:
        """What a progress bar counts to, in `unit`."""
        ...

    @property
    def unit(self) -> str:
        """documents or B."""
        ...

    @property
    def bytes(self) -> int:
        """The size on the disk."""
        ...

    def stripes(self, workers: int) -> Sequence[Stripe]:
        """Every block once, in order as far as several workers can have it so."""
        ...

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """Every block of a file in order; a block that is not asked for its chunks costs little.

        Closing it closes the file.

        UserError, which names document or line, for a text that cannot be read.
        """
        ...

    def train_texts(self) -> Iterator[str]:
        """The documents of part 0, in order."""
        ...

    def part(self, text: str) -> int:
        """0 for train, 1 for validation, where one source holds both."""
        ...
