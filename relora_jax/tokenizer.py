"""SentencePiece models: loaded, found by a name, or trained on documents.

A model trained here loses nothing: decode(encode(text)) == text (but that U+2581, SentencePiece's
sign for a space, comes back as one). Paragraphs are kept, as one piece for a line's end and one for
an empty line; what has no piece of its own is spelled in bytes.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, SupportsInt

import numpy as np
import sentencepiece
from jaxtyping import Int32

from relora_jax import places

PAD, EOS, UNK = 0, 1, 2  # T5's
LINE_ENDS = ["\n", "\n\n"]
LONGEST_LINE = 2**20  # bytes; SentencePiece drops longer ones without a word
TRAINING_BYTES = 100_000_000  # a model is trained on the first so many bytes of the documents
TRAINER = 1  # part of a trained model's name in the cache: raise it with any change of `_SETTINGS`
_SETTINGS: dict[str, Any] = {
    "num_threads": 16,  # the model depends on it, on any machine
    "pad_id": PAD,
    "eos_id": EOS,
    "unk_id": UNK,
    "bos_id": -1,
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,  # so that a word is the same pieces after a line's end and at the start
    "user_defined_symbols": LINE_ENDS,
    "max_sentence_length": LONGEST_LINE,
    "minloglevel": 2,
}
_SPEC = re.compile(r"\s*(bpe|unigram)\s*\(\s*([^()]*?)\s*\)\s*")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts <-> ids below `pieces`. `pad` fills rows and is never counted: eos where a model has none."""

    path: Path
    sha256: str
    pieces: int
    eos: int
    pad: int
    model: sentencepiece.SentencePieceProcessor = dataclasses.field(repr=False)

    def encode_documents(self, texts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each text, by SentencePiece's own threads. No EOS: whoever packs ends documents."""
        return [np.asarray(ids, np.int32) for ids in self.model.encode(texts)]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids; EOS and pad give none."""
        return self.model.decode([int(i) for i in ids])


def load(path: Path | str) -> Tokenizer:
    """The SentencePiece model in a file."""
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    try:
        if not content:
            raise RuntimeError("the file is empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise ValueError(f"{path} is no SentencePiece model: name another file, or bpe(4096)") from error
    eos, pad = model.eos_id(), model.pad_id()
    if eos < 0:
        raise ValueError(f"tokenizer {path} has no eos piece to end documents with: train it with an eos_id")
    sha256 = hashlib.sha256(content).hexdigest()
    pieces = model.get_piece_size()
    return Tokenizer(
        path=path, sha256=sha256, pieces=pieces, eos=eos, pad=pad if pad >= 0 else eos, model=model
    )


def train(lines: Iterable[str], *, kind: str, pieces: int, path: Path) -> Tokenizer:
    """A "bpe" or "unigram" model of exactly `pieces` pieces at `path`: the same for the same lines.

    `path` is written whole or not at all. Lines carry no line ends: those are pieces already.
    """
    written = io.BytesIO()
    settings = {**_SETTINGS, "model_type": kind, "vocab_size": pieces, "model_writer": written}
    sentences = list(lines)  # so that an error of the lines is raised here, not inside SentencePiece
    try:
        if not sentences:
            raise RuntimeError("] there is no text")
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), **settings)  # pyright: ignore
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ValueError(
            f"no {kind} model of {pieces} pieces can be trained on this text: {reason}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    aside.write_bytes(written.getvalue())
    aside.replace(path)
    return load(path)


def find(spec: str, documents: Callable[[], Iterable[str]], key: str) -> Tokenizer:
    """The model that a config's `data.tokenizer` names.

    "bpe(n)", "unigram(n)": trained on the documents, once for each `key` that tells their text (a
    dataset's version and split). Otherwise a path, or the name of a model under the cache's
    `tokenizers/`.
    """
    folder = places.cache_dir() / "tokenizers"
    if re.match(r"\s*(bpe|unigram)\s*\(", spec):
        kind, pieces = _parse(spec)
        told = hashlib.sha256(f"{TRAINER} {key}".encode()).hexdigest()[:16]
        path = places.make_once(
            folder / f"{kind}-{pieces}-{told}.model",
            lambda aside: train(_lines(documents()), kind=kind, pieces=pieces, path=aside),
            variable="XDG_CACHE_HOME",
        )
        return load(path)
    candidates = [Path(spec).expanduser(), folder / f"{spec}.model"]
    for path in candidates:
        if path.is_file():
            return load(path)
    raise ValueError(
        f"tokenizer {spec!r} is no file, nor is {candidates[1]}: name a SentencePiece model or bpe(4096)"
    )


def _parse(spec: str) -> tuple[str, int]:
    match = _SPEC.fullmatch(spec)
    if match is None or not re.fullmatch(r"[0-9]+", match[2]) or int(match[2]) == 0:
        raise ValueError(f"tokenizer {spec!r} cannot be read: write a number of pieces, such as bpe(4096)")
    return match[1], int(match[2])


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines that are not empty, until TRAINING_BYTES are given: SentencePiece would drop whole documents."""
    left = TRAINING_BYTES
    for document in documents:
        for line in document.split("\n"):
            if line:
                left -= len(line.encode())
                yield line
        if left <= 0:
            return
