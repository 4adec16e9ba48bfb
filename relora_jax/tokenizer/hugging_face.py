"""The tokenizer.json (Hugging Face) backend of `tokenizer.Tokenizer`: encodes exactly the text.

It ignores the file's settings for bos and eos around a text, truncation, padding and BPE dropout. A special
token spelled out in a text is encoded as text.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from relora_jax.errors import UserError

FILE = "tokenizer.json"
HIGHEST_ID = 2**24  # above it, the file counts as damaged: counts of pieces are arrays of this length
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
# Files next to a tokenizer.json that may define the special ids, in order of precedence.
_SIDECARS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


class HuggingFace:
    """A tokenizer.json: `vocab_size` is the highest id + 1; `eos` and `pad` are None if not defined.

    `highest` is the highest id that a text can contain: of the model's pieces and of added tokens that are
    not special.
    """

    def __init__(self, path: Path, content: bytes, *, parallel: bool) -> None:
        # the library warns at each fork unless the variable is set
        default = os.environ.get("TOKENIZERS_PARALLELISM", "true")
        os.environ["TOKENIZERS_PARALLELISM"] = default if parallel else "false"
        self._model = _parse(path, content)
        ids = self._model.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not 0 < self.vocab_size <= HIGHEST_ID:
            raise UserError(
                f"{path} is not a valid tokenizer (its highest id is {self.vocab_size - 1}): use another file"
            )
        added = self._model.get_added_tokens_decoder()
        special = {_unhidden(token.content): i for i, token in sorted(added.items()) if token.special}
        ordinary = {i for i, token in added.items() if not token.special}
        pieces = self._model.get_vocab(with_added_tokens=False).values()
        self.highest = max(ordinary.union(pieces), default=0)
        sidecars = [read_sidecar(path.parent / name) for name in _SIDECARS] if path.name == FILE else []
        self.eos = self._special_id("eos", EOS_NAMES, sidecars, special)
        self.pad = self._special_id("pad", PAD_NAMES, sidecars, special)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(texts)]

    def piece(self, i: int) -> str:
        """The piece of an id, as spelled in the file."""
        return _unhidden(self._model.id_to_token(i) or "")

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        return self._model.decode(ids, skip_special_tokens=True)

    def _special_id(
        self, name: str, defaults: Sequence[str], sidecars: list[dict[str, Any]], special: dict[str, int]
    ) -> int | None:
        """The id of `name` from the sidecar files, else of one of the `defaults`; None if there is none."""
        for sidecar in sidecars:
            token, number = sidecar.get(f"{name}_token"), sidecar.get(f"{name}_token_id")
            token = token.get("content") if isinstance(token, dict) else token
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(token, str):
                number = special.get(token, self._model.token_to_id(token))
            if type(number) is int and 0 <= number < self.vocab_size:
                return number
        return next((special[token] for token in defaults if token in special), None)


def default_bos(path: Path, content: bytes) -> int | None:
    """The id that a tokenizer.json adds before each text; None if it adds none, or several."""
    model = _parse(path, content, plain=False)
    plain, full = (model.encode("A", add_special_tokens=add).ids for add in (False, True))
    first, rest = full[:1], full[1 : len(plain) + 1]
    return first[0] if plain and rest == plain else None


def _parse(path: Path, content: bytes, *, plain: bool = True) -> tokenizers.Tokenizer:
    """The library's tokenizer; `plain` adds nothing around a text. UserError if the file is invalid."""
    try:
        settings = json.loads(content)
        model = settings["model"]
        settings |= {"truncation": None, "padding": None} | ({"post_processor": None} if plain else {})
        if "dropout" in model:
            model["dropout"] = None
        if plain and isinstance(model["vocab"], list):
            _hide_special_pieces(settings["added_tokens"], model["vocab"])
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
        tokenizer.encode_special_tokens = True
        tokenizer.encode("A file may load and still fail at its first text.")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the library raises Exception, and panics, which are not Exceptions
        reason = str(error).partition("\n")[0][:100]
        raise UserError(f"{path} is not a valid {FILE} ({reason}): use another file, or bpe(4096)") from error
    return tokenizer


def _hide_special_pieces(added: list[dict[str, Any]], vocab: list[list[Any]]) -> None:
    """Renames special pieces so that no text contains them: unigram models would match them like others."""
    index_of = {piece: index for index, (piece, _) in enumerate(vocab)}
    for token in added:
        if token["special"] and token["content"] in index_of:
            hidden = f"\0{token['content']}\0"
            vocab[index_of[token["content"]]][0] = token["content"] = hidden


def _unhidden(content: str) -> str:
    return content.strip("\0")


def read_sidecar(path: Path) -> dict[str, Any]:
    """The object in a JSON file next to a tokenizer.json; empty if there is no file."""
    try:
        settings = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, which defines a tokenizer's special tokens, cannot be read: {error}"
        ) from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}, which defines a tokenizer's special tokens, is not a JSON object")
    return settings
