"""The tokenizer.json (Hugging Face) backend of `tokenizer.Tokenizer`: encodes exactly the text.

It ignores the file's settings for bos and eos around a text, truncation, padding and BPE dropout. A special
token spelled out in a text is encoded as text, and so are eos, pad and bos if they are added tokens.
"""

import json
import os
import secrets
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from relora_jax.errors import UserError
from relora_jax.tokenizer import sidecars

FILE = "tokenizer.json"
HIGHEST_ID = 2**24  # above it, the file counts as damaged: counts of pieces are arrays of this length
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
_HIDDEN = secrets.token_hex(16)  # before the name of a piece that no text contains: no text has it by chance


class HuggingFace:
    """A tokenizer.json: `vocab_size` is the highest id + 1; `eos` and `pad` are None if not defined.

    `highest` is the highest id that a text can contain: of the model's pieces and of added tokens that are
    not special; `unknown` is what it cannot spell. `set_ids` are ids that the user set as eos, pad or bos;
    `hidden` are the ids that no text contains, though the file does not mark them as special.
    """

    def __init__(
        self, path: Path, content: bytes, *, set_ids: Collection[int] = (), parallel: bool = True
    ) -> None:
        # the library warns at each fork unless the variable is set
        default = os.environ.get("TOKENIZERS_PARALLELISM", "true")
        os.environ["TOKENIZERS_PARALLELISM"] = default if parallel else "false"
        self.bos = None  # `prefix` says what the file puts before a text
        self._model = _parse(path, content)
        ids = self._model.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not 0 < self.vocab_size <= HIGHEST_ID:
            raise UserError(
                f"{path} is not a valid tokenizer (its highest id is {self.vocab_size - 1}): use another file"
            )
        added = self._model.get_added_tokens_decoder()
        special = {token.content: i for i, token in sorted(added.items()) if token.special}
        settings = [sidecars.read(path.parent / name) for name in sidecars.FILES if path.name == FILE]
        self.eos = self._special_id("eos", EOS_NAMES, settings, special)
        self.pad = self._special_id("pad", PAD_NAMES, settings, special)
        hidden = {*special.values(), *(added.keys() & {self.eos, self.pad, *set_ids})}
        named = {sidecars.content(each.get(f"{name}_token")) for each in settings for name in ("eos", "pad")}
        hidden |= {i for i in (self.eos, self.pad) if i is not None and self._model.id_to_token(i) in named}
        self.hidden = sorted(hidden - {*special.values()})
        self._texts = {i: self._model.decode([i], skip_special_tokens=False) for i in hidden}
        self._model = _parse(path, content, hidden=hidden)
        unknown = getattr(self._model.model, "unk_token", None)
        self.unknown = None if unknown is None else self._model.token_to_id(unknown)
        if isinstance(self._model.model, tokenizers.models.Unigram):  # which does not say
            self.unknown = json.loads(content)["model"].get("unk_id")
        pieces = self._model.get_vocab(with_added_tokens=False).values()
        self.highest = max((added.keys() - hidden).union(pieces), default=0)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts)]

    def piece(self, i: int) -> str:
        """The piece of an id, as spelled in the file."""
        return (self._model.id_to_token(i) or "").removeprefix(_HIDDEN)

    def spelled(self, i: int) -> str:
        """The text of one id, even of a special token."""
        return self._texts.get(i) or self._model.decode([i], skip_special_tokens=False) or self.piece(i)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._model.decode(ids, skip_special_tokens=True)

    def _special_id(
        self, name: str, defaults: Sequence[str], settings: list[dict[str, Any]], special: dict[str, int]
    ) -> int | None:
        """The id of `name` from the files' `settings`, else of one of the `defaults`; None without one."""
        for each in settings:
            token, number = sidecars.content(each.get(f"{name}_token")), each.get(f"{name}_token_id")
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(token, str):
                number = special.get(token, self._model.token_to_id(token))
            if type(number) is int and 0 <= number < self.vocab_size:
                return number
        return next((special[token] for token in defaults if token in special), None)


def prefix(path: Path, content: bytes) -> list[int]:
    """The ids that a tokenizer.json adds before each text."""
    model = _parse(path, content, plain=False)
    plain, full = (model.encode("A", add_special_tokens=add).ids for add in (False, True))
    starts = range(len(full) - len(plain) + 1) if plain else ()
    return next((full[:start] for start in starts if full[start:][: len(plain)] == plain), [])


def _parse(
    path: Path, content: bytes, *, plain: bool = True, hidden: Collection[int] = ()
) -> tokenizers.Tokenizer:
    """The library's tokenizer; `plain` adds nothing around a text. UserError if the file is invalid.

    Added tokens with `hidden` ids are special, and no text contains them.
    """
    try:
        settings = json.loads(content)
        model = settings["model"]
        settings |= {"truncation": None, "padding": None} | ({"post_processor": None} if plain else {})
        if "dropout" in model:
            model["dropout"] = None
        if hidden:
            _hide_special_pieces(settings["added_tokens"], model, hidden)
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
        tokenizer.encode_special_tokens = True
        tokenizer.encode("A file may load and still fail at its first text.")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises Exception, and panics, which are not Exceptions
        reason = str(error).partition("\n")[0][:100]
        raise UserError(f"{path} is not a valid {FILE} ({reason}): use another file, or bpe(4096)") from error
    return tokenizer


def _hide_special_pieces(added: list[dict[str, Any]], model: dict[str, Any], ids: Collection[int]) -> None:
    """Makes the tokens with these ids special and hides those that are pieces: no text contains them.

    A model looks up words, runs of characters or merges among its pieces, whether they are special or not. A
    character of a BPE model keeps its name: without it, texts would lose the character.
    """
    vocab = model["vocab"]
    id_of = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else vocab
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    pieces = {i: piece for piece, i in id_of.items() if i in ids}
    unlisted = sorted(pieces.keys() - {token["id"] for token in added})
    added += [{"id": i, "content": pieces[i], **plain} for i in unlisted]
    keeps_characters = "merges" in model and not model.get("byte_fallback")
    hidden = {
        piece: _HIDDEN + piece for piece in pieces.values() if not (keeps_characters and len(piece) == 1)
    }
    for token in added:
        if token["id"] in ids:
            token |= {"special": True, "content": hidden.get(token["content"], token["content"])}
    if isinstance(vocab, list):
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in vocab]
    else:
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in vocab.items()}
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    if hidden and "merges" in model:
        cut = len(model.get("continuing_subword_prefix") or "")
        model["merges"] = [pair for pair in model["merges"] if hidden.keys().isdisjoint(_formed(pair, cut))]


def _formed(merge: str | list[str], cut: int) -> tuple[str, str, str]:
    """The two parts of a merge, and the piece that it forms; `cut` characters mark a part inside a word."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right, left + right[cut:]
