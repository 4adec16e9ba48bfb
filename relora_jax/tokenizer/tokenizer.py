"""Finds, loads (SentencePiece, Hugging Face's tokenizer.json) and trains tokenizers.

Models trained here are SentencePiece models and lossless: decode(encode(text)) == text, except that U+2581,
SentencePiece's space symbol, decodes to a space. A line end and an empty line are one piece each; characters
without a piece are spelled in bytes.
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
from relora_jax.tokenizer import hugging_face, sidecars
from relora_jax.tokenizer.hugging_face import FILE, HuggingFace
from relora_jax.tokenizer.sentencepiece import SentencePiece

PAD, EOS, UNK = 0, 1, 2  # T5's
FILES = (FILE, "tokenizer.model", "spiece.model")  # in a directory, the first that exists
ENDINGS = (".model", ".json")  # of file names in the cache
LINE_ENDS = ["\n", "\n\n"]
LONGEST_LINE = 2**20  # bytes; SentencePiece silently drops longer lines
TRAINING_BYTES = 100_000_000  # of the documents, from the start
TRAINER = 1  # part of a trained model's name in the cache: increment it when `_SETTINGS` change
_SETTINGS: dict[str, Any] = {
    "num_threads": 16,  # fixed, as the model depends on it
    "pad_id": PAD,
    "eos_id": EOS,
    "unk_id": UNK,
    "bos_id": -1,
    "byte_fallback": True,
    "character_coverage": 1.0,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,  # so that a word has the same pieces after a line end and at the start
    "user_defined_symbols": LINE_ENDS,
    "max_sentence_length": LONGEST_LINE,
    "minloglevel": 2,
}
_SPEC = re.compile(r"\s*(bpe|unigram)\s*\(\s*([^()]*?)\s*\)\s*")


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Texts <-> ids below `vocab_size`. `pad` fills rows and is never counted; it is eos if a model has none.

    Each document starts with `bos`, unless it is None. A pickle contains only path and special ids; the file
    is read again on unpickling, without threads.
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
        """What rows of ids depend on, as stored in a row store's manifest and in run.json."""
        bos = {} if self.bos is None else {"bos": self.bos}
        hidden = {"hidden": self.model.hidden} if self.model.hidden else {}  # files beside it may name them
        return {"tokenizer": self.sha256, "eos": self.eos, "pad": self.pad, **bos, **hidden}

    @property
    def highest(self) -> int:
        """The highest id that rows can contain; a tokenizer may have unused pieces above it."""
        special = (self.eos, self.pad, self.bos)
        return max(self.model.highest, *(i for i in special if i is not None))

    def encode_documents(self, texts: list[str]) -> list[Int32[np.ndarray, " _"]]:
        """The ids of each text, on the library's own threads, without EOS: `Packer` adds it."""
        return [np.asarray(ids, np.int32) for ids in self.model.encode(texts)]

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of ids, without eos, pad and bos."""
        return self.model.decode([int(i) for i in ids if int(i) not in (self.eos, self.pad, self.bos)])

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.path, self.sha256, self.eos, self.pad, self.bos)


def load(
    path: Path | str, *, eos_id: int = -1, pad_id: int = -1, bos_id: int = -1, parallel: bool = True
) -> Tokenizer:
    """The tokenizer in a file: .json is Hugging Face's format, anything else SentencePiece's.

    -1 means the file's own eos or pad, and no bos.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer {path} cannot be read: {error.strerror}") from error
    model = (
        HuggingFace(path, content, set_ids=(eos_id, pad_id, bos_id), parallel=parallel)
        if path.suffix == ".json"
        else SentencePiece(path, content, parallel=parallel)
    )
    for name, i in (("eos", eos_id), ("pad", pad_id), ("bos", bos_id)):
        if not -1 <= i < model.vocab_size:
            raise UserError(
                f"data.{name}_id {i} is not an id of tokenizer {path}: choose one of 0 to "
                f"{model.vocab_size - 1}, or -1 for {'none' if name == 'bos' else 'its own'}"
            )
    eos = model.eos if eos_id < 0 else eos_id
    if eos is None:
        raise UserError(f"tokenizer {path} has no eos to end documents with: set data.eos_id")
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


def prefix(path: Path) -> list[int]:
    """The ids that transformers puts before each text with this tokenizer file: none for a lone .model."""
    return hugging_face.prefix(path, path.read_bytes()) if path.suffix == ".json" else []


def control_in_text(tokenizer: Tokenizer) -> list[str]:
    """A line for each of eos, pad and bos that a text can contain, or whose name a text loses."""
    names: dict[int, str] = {}
    for name, i in (("eos", tokenizer.eos), ("bos", tokenizer.bos), ("pad", tokenizer.pad)):
        if i is not None:
            names.setdefault(i, name)
    lines = []
    for i, name in names.items():
        text = tokenizer.model.spelled(i)
        ids = tokenizer.encode_documents([text])[0].tolist()
        if i in ids:
            lines.append(f"{text!r} in a text has the id of {name}, {i}, in the middle of a document")
        elif all(j == tokenizer.model.unknown or not tokenizer.decode([j]).strip() for j in ids):
            lines.append(f"{text!r}, the {name}, cannot be spelled as text: in a text it is lost")
    return [f"note: tokenizer {tokenizer.path}: {line}" for line in lines]


def _unpickle(path: Path, sha256: str, eos: int, pad: int, bos: int | None) -> Tokenizer:
    ids = {"eos_id": eos, "pad_id": pad, "bos_id": -1 if bos is None else bos}
    tokenizer = load(path, **ids, parallel=False)
    if tokenizer.sha256 != sha256:
        raise UserError(f"tokenizer {path} changed while it was in use: start again")
    return tokenizer


def train(documents: Iterable[str], *, kind: str, vocab_size: int, path: Path) -> Tokenizer:
    """A "bpe" or "unigram" model of exactly `vocab_size` pieces, written to `path`; deterministic.

    It is trained on the lines of the first TRAINING_BYTES, without line ends, which are pieces already. The
    file is written atomically.
    """
    model = io.BytesIO()
    settings = {**_SETTINGS, "model_type": kind, "vocab_size": vocab_size, "model_writer": model}
    sentences = list(_lines(documents))  # raises errors of the documents here, not inside SentencePiece
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
    atomic.write(path, model.getvalue())
    return load(path)


def find(spec: str, documents: Callable[[], Iterable[str]], key: str, **ids: Any) -> Tokenizer:
    """The tokenizer that a config's `data.tokenizer` names; `ids` are arguments of `load`.

    "bpe(n)", "unigram(n)": trained on the documents, once for each `key` that identifies their text (a
    dataset's version and split). Otherwise the path of a file or of a directory that contains one, or the
    name of a file in the cache's `tokenizers/`.
    """
    folder = places.cache_dir() / "tokenizers"
    if is_trained(spec):
        kind, vocab_size = _parse(spec)
        digest = hashlib.sha256(f"{TRAINER} {key}".encode()).hexdigest()[:16]
        path = atomic.make_once(
            folder / f"{kind}-{vocab_size}-{digest}.model",
            lambda partial: train(documents(), kind=kind, vocab_size=vocab_size, path=partial),
            variable="XDG_CACHE_HOME",
        )
        return load(path, **ids)
    if path := locate(spec):
        tokenizer = load(path, **ids)
        if path.suffix == ".model" and path != Path(spec).expanduser():
            _check_files(tokenizer, **ids)
        return tokenizer
    is_directory = Path(spec).expanduser().is_dir()
    problem = f"is a directory without {', '.join(FILES)}" if is_directory else "not found"
    raise UserError(
        f"tokenizer {spec!r} {problem}, and there is no {folder / spec}{' or '.join(ENDINGS)}: "
        f"pass the path of a SentencePiece model or {FILE}, or bpe(4096)"
    )


def _check_files(tokenizer: Tokenizer, *, eos_id: int = -1, pad_id: int = -1, **_: int) -> None:
    """UserError if files next to a SentencePiece model, as transformers', say more or other than it does."""
    folder, model = tokenizer.path.parent, tokenizer.path.name
    config, special = (sidecars.read(folder / name) for name in (sidecars.CONFIG, sidecars.SPECIAL))
    added = [token["content"] for token in (config.get(sidecars.DECODER) or {}).values()]
    added += sidecars.read(folder / sidecars.ADDED)
    pieces = {tokenizer.model.piece(i) for i in range(tokenizer.vocab_size)}
    problems = [f"adds {token!r} to its {model}, which is not read" for token in added if token not in pieces]
    for name, id_set, own in (("eos", eos_id, tokenizer.eos), ("pad", pad_id, tokenizer.pad)):
        for settings in (config, special):
            token = sidecars.content(settings.get(f"{name}_token"))
            if id_set < 0 and token not in (None, tokenizer.model.piece(own)):
                problem = (
                    f"names {token!r} as its {name}, which is {tokenizer.model.piece(own)!r} in its {model}"
                )
                problems.append(f"{problem} (data.{name}_id can choose it)")
    if sidecars.has_template(folder):
        problems.append(f"has a chat template, which is not kept with its {model}")
    if problems:
        raise UserError(
            f"tokenizer {folder} {problems[0]}: let transformers write a {FILE} (AutoTokenizer."
            f"from_pretrained(...).save_pretrained(...)), or pass {tokenizer.path} to do without"
        )


def is_trained(spec: str) -> bool:
    """Whether `spec` names a tokenizer that is trained on a run's text."""
    return bool(re.match(r"\s*(bpe|unigram)\s*\(", spec))


def locate(spec: str) -> Path | None:
    """The file that a `spec` of an existing tokenizer names; None if not found."""
    path, folder = Path(spec).expanduser(), places.cache_dir() / "tokenizers"
    candidates = [path, *(path / name for name in FILES), *(folder / f"{spec}{end}" for end in ENDINGS)]
    return next((path for path in candidates if path.is_file()), None)


def _parse(spec: str) -> tuple[str, int]:
    match = _SPEC.fullmatch(spec)
    if match is None or not re.fullmatch(r"0*[1-9][0-9]{0,8}", match[2]):
        raise UserError(f"tokenizer {spec!r} is invalid: write a number of pieces, such as bpe(4096)")
    return match[1], int(match[2])


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """The non-empty lines of the first TRAINING_BYTES: SentencePiece would drop long documents as a whole."""
    remaining = TRAINING_BYTES
    for document in documents:
        for line in document.split("\n"):
            if line:
                remaining -= len(line.encode())
                yield line
        if remaining <= 0:
            return
