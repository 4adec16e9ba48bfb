"""Text as blocks: BLOCK_DOCUMENTS consecutive documents of one input file; the last block may have fewer.

Each block is packed on its own, so a row depends only on its block: not on the number of workers, nor on
later files.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from relora_jax.errors import UserError

# About 31M tokens, 65 MB and half a minute of C4: cheap to lose, and few enough files (6,144 for all of C4,
# 430 for 12B tokens) to keep open at once.
BLOCK_DOCUMENTS = 65_536
CHUNK_DOCUMENTS = 128  # documents in memory at a time


class BadDocumentError(UserError):
    """A document without text that can be read, in a file that can: `problem` names both."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem

    def __str__(self) -> str:
        return "{}: {}, or skip such documents (prepare --skip_bad_documents)".format(*self.args)


class Stripe(NamedTuple):
    """Blocks first, first + step, first + 2 * step, ... of an input file: one worker's task."""

    file: int
    first: int
    step: int

    def __contains__(self, block: object) -> bool:
        return isinstance(block, int) and block % self.step == self.first


class Chunk(NamedTuple):
    """Some documents of a block; `size` is their share of the source's `size`.

    `skipped`: the problem of each bad document among them.
    """

    texts: list[str]
    size: float
    skipped: list[str]


@runtime_checkable
class Source(Protocol):
    """Text that `prepare` reads; must be picklable for the worker processes."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def files(self) -> int:
        """Number of input files."""
        ...

    @property
    def documents(self) -> int | None:
        """Number of documents; None if unknown without reading them all."""
        ...

    @property
    def size(self) -> float:
        """Total for a progress bar, in `unit`."""
        ...

    @property
    def unit(self) -> str:
        """Unit of `size`: documents or B."""
        ...

    @property
    def bytes(self) -> int:
        """Size on disk."""
        ...

    @property
    def skip_bad_documents(self) -> bool:
        """Whether bad documents are skipped; otherwise they raise BadDocumentError."""
        ...

    def stripes(self, workers: int) -> Sequence[Stripe]:
        """Stripes that cover every block once, as close to file order as several workers allow."""
        ...

    def blocks(self, file: int) -> Generator[Iterator[Chunk], None, None]:
        """The blocks of a file in order; a block whose chunks are not consumed costs little.

        Closing the generator closes the file. UserError, naming the document or line, for unreadable text,
        which is a BadDocumentError if other documents can still be read.
        """
        ...

    def train_texts(self) -> Iterator[str]:
        """The documents of part 0, in order."""
        ...

    def part(self, text: str) -> int:
        """0 for train, 1 for validation, if one source provides both."""
        ...
