"""Tokenizers: found by a name, loaded (SentencePiece, Hugging Face's tokenizer.json), or trained.

A model trained here is SentencePiece's and loses nothing: decode(encode(text)) == text (but that U+2581,
its sign for a space, comes back as one). Paragraphs are kept, as one piece for a line's end and one for
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

from relora_jax.errors import UserError
from relora_jax.storage import atomic, places
from relora_jax.tokenizer import hugging_face
from relora_jax.tokenizer.hugging_face import FILE, HuggingFace
from relora_jax.tokenizer.sentencepiece import SentencePiece

PAD, EOS, UNK = 0, 1, 2  # T5's
FILES = (FILE, "tokenizer.model", "spiece.model")  # of a directory, the first that is there
ENDINGS = (".model", ".json")  # of a name in the cache
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
    """Texts <-> ids below `vocab_size`. `pad` fills rows and is never counted: eos where a model has none.

    `bos` begins each document; None: nothing does.
    Pickled it is only its path and ids, read again where it is unpickled, there without threads.
    """

    path: Path
    sha256: str
    vocab_size: int
    eos: int
    pad: int
    model: HuggingFace | SentencePiece = dataclasses.field(repr=False)
    bos: int | None = None

    @property
    def key(self) -> dict[str, Any]:
        """What of it decides rows of ids, as a store's manifest and run.json have it."""
        bos = {} if self.bos is None else {"bos": self.bos}
        return {"tokenizer": self.sha256, "eos": self.eos, "pad": self.pad, **bos}

    @property
    def highest(self) -> int:
        """The highest id that rows can hold, below which a tokenizer may have more pieces than a model."""
        own = (self.eos, self.pad, self.bos)
        return max(self.model.highest, *(i for i in own if i is not None))

    def encode_documents(self, texts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each text, by the library's own threads. No EOS: whoever packs ends documents."""
        return [np.asarray(ids, np.int32) for ids in self.model.encode(texts)]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids; EOS, pad and bos give none."""
        return self.model.decode([int(i) for i in ids if int(i) not in (self.eos, self.pad, self.bos)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _load_again, (self.path, self.sha256, self.eos, self.pad, self.bos)


def load(
    path: Path | str, *, eos_id: int = -1, pad_id: int = -1, bos_id: int = -1, parallel: bool = True
) -> Tokenizer:
    """The tokenizer in a file: .json is Hugging Face's, anything else SentencePiece's.

    -1 is its own eos or pad, and no bos.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    model = (HuggingFace if path.suffix == ".json" else SentencePiece)(path, content, parallel=parallel)
    for name, given in (("eos", eos_id), ("pad", pad_id), ("bos", bos_id)):
        if not -1 <= given < model.vocab_size:
            raise UserError(
                f"data.{name}_id {given} is no id of tokenizer {path}: name one of 0 to "
                f"{model.vocab_size - 1}, or -1 for {'none' if name == 'bos' else 'its own'}"
            )
    eos = model.eos if eos_id < 0 else eos_id
    if eos is None:
        raise UserError(f"tokenizer {path} has no eos to end documents with: give its id as data.eos_id")
    pad = model.pad if pad_id < 0 else pad_id
    return Tokenizer(
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        vocab_size=model.vocab_size,
        eos=eos,
        pad=eos if pad is None else pad,
        model=model,
        bos=None if bos_id < 0 else bos_id,
    )


def begins(path: Path) -> int | None:
    """The id that transformers puts before each text of the tokenizer in this file; None: it puts none."""
    content = path.read_bytes()
    if path.suffix == ".json":
        return hugging_face.begins(path, content)
    told = hugging_face.read_beside(path.parent / "tokenizer_config.json")
    own = SentencePiece(path, content, parallel=False).bos
    return None if told.get("add_bos_token") is False else own


def _load_again(path: Path, sha256: str, eos: int, pad: int, bos: int | None) -> Tokenizer:
    ids = {"eos_id": eos, "pad_id": pad, "bos_id": -1 if bos is None else bos}
    tokenizer = load(path, **ids, parallel=False)
    if tokenizer.sha256 != sha256:
        raise UserError(f"tokenizer {path} has been changed meanwhile: begin again")
    return tokenizer


def train(documents: Iterable[str], *, kind: str, vocab_size: int, path: Path) -> Tokenizer:
    """A "bpe" or "unigram" model of exactly `vocab_size` pieces at `path`: the same for the same text.

    It sees the lines of the first TRAINING_BYTES, without their ends: those are pieces already. `path` is
    written whole or not at all.
    """
    written = io.BytesIO()
    settings = {**_SETTINGS, "model_type": kind, "vocab_size": vocab_size, "model_writer": written}
    sentences = list(
        _lines(documents)
    )  # so that an error of the lines is raised here, not inside SentencePiece
    try:
        if not sentences:
            raise RuntimeError("] there is no text")
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), **settings)  # pyright: ignore
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise UserError(
            f"no {kind} model of {vocab_size} pieces can be trained on this text: {reason}"
        ) from error
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, written.getvalue())
    return load(path)


def find(spec: str, documents: Callable[[], Iterable[str]], key: str, **ids: Any) -> Tokenizer:
    """The tokenizer that a config's `data.tokenizer` names; `ids` as `load` has them.

    "bpe(n)", "unigram(n)": trained on the documents, once for each `key` that tells their text (a
    dataset's version and split). Otherwise the path of a file or of a directory that holds one, or the
    name of a file under the cache's `tokenizers/`.
    """
    folder = places.cache_dir() / "tokenizers"
    if is_trained(spec):
        kind, vocab_size = _parse(spec)
        told = hashlib.sha256(f"{TRAINER} {key}".encode()).hexdigest()[:16]
        path = atomic.make_once(
            folder / f"{kind}-{vocab_size}-{told}.model",
            lambda aside: train(documents(), kind=kind, vocab_size=vocab_size, path=aside),
            variable="XDG_CACHE_HOME",
        )
        return load(path, **ids)
    if path := locate(spec):
        return load(path, **ids)
    named = Path(spec).expanduser()
    what = f"is a directory without {', '.join(FILES)}" if named.is_dir() else "is no file"
    raise UserError(
        f"tokenizer {spec!r} {what}, nor is there {folder / spec}{' or '.join(ENDINGS)}: "
        f"name a SentencePiece model, a {FILE} or bpe(4096)"
    )


def is_trained(spec: str) -> bool:
    """Whether the name is of a kind that is trained on a run's text."""
    return bool(re.match(r"\s*(bpe|unigram)\s*\(", spec))


def locate(spec: str) -> Path | None:
    """The file that any other name names; None where it is not there."""
    named, folder = Path(spec).expanduser(), places.cache_dir() / "tokenizers"
    candidates = [named, *(named / name for name in FILES), *(folder / f"{spec}{end}" for end in ENDINGS)]
    return next((path for path in candidates if path.is_file()), None)


def _parse(spec: str) -> tuple[str, int]:
    match = _SPEC.fullmatch(spec)
    if match is None or not re.fullmatch(r"0*[1-9][0-9]{0,8}", match[2]):
        raise UserError(f"tokenizer {spec!r} cannot be read: write a number of pieces, such as bpe(4096)")
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
