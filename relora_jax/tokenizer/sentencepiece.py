"""The SentencePiece backend of `tokenizer.Tokenizer`."""

from pathlib import Path

import sentencepiece

from relora_jax.errors import UserError


class SentencePiece:
    """A SentencePiece model: `eos`, `pad` and `bos` are None if it has none.

    `unknown` is the id of what it cannot spell.
    `highest` is the highest id that a text can contain, which excludes control pieces.
    """

    def __init__(self, path: Path, content: bytes, *, parallel: bool) -> None:
        try:
            if not content:
                raise RuntimeError("the file is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise UserError(f"{path} is not a SentencePiece model: use another file, or bpe(4096)") from error
        self._threads = -1 if parallel else 1
        self.vocab_size = self._model.get_piece_size()
        ids = self._model.eos_id(), self._model.pad_id(), self._model.bos_id()
        self.eos, self.pad, self.bos = (i if i >= 0 else None for i in ids)
        self.unknown = self._model.unk_id()
        ordinary = (i for i in reversed(range(self.vocab_size)) if not self._model.is_control(i))  # pyright: ignore
        self.highest, self.hidden = next(ordinary), list[int]()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return self._model.encode(texts, num_threads=self._threads)  # pyright: ignore

    def piece(self, i: int) -> str:
        """The piece of an id, as spelled in the file."""
        return self._model.id_to_piece(i)  # pyright: ignore

    def spelled(self, i: int) -> str:
        """The text of one id, even of a control piece."""
        return self.decode([i]) or self.piece(i)

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self._model.decode(ids)
