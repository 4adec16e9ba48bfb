"""tokenizer.json, Hugging Face's one-file tokenizers, as plain encoders: ids of a text and of nothing else.

What the file asks for beside that is left out: bos and eos around a text, truncation, padding, BPE's
dropout. A special token that is written out in a text is text.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from relora_jax.errors import UserError

FILE = "tokenizer.json"
HIGHEST_ID = 2**24  # above it, a file is damaged: whoever counts pieces makes an array of so many
EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eot_id|>")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>")
# The files beside a tokenizer.json that may tell the special ids: first by their text, then by number.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")


class HuggingFace:
    """A tokenizer.json: `vocab_size` is the highest id + 1; `eos`, `pad` are None where nothing names them.

    `highest` is the highest id of a text: of the model's pieces, which special tokens added to it are not,
    and of added ones that are not special.
    """

    def __init__(self, path: Path, content: bytes, *, parallel: bool) -> None:
        # the library warns at each fork of a process that has not said whether it wants threads
        default = os.environ.get("TOKENIZERS_PARALLELISM", "true")
        os.environ["TOKENIZERS_PARALLELISM"] = default if parallel else "false"
        self._model = _parse(path, content)
        ids = self._model.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if not 0 < self.vocab_size <= HIGHEST_ID:
            raise UserError(
                f"{path} is no tokenizer: its highest id is {self.vocab_size - 1}: name another file"
            )
        added = self._model.get_added_tokens_decoder()
        special = {_shown(token.content): i for i, token in sorted(added.items()) if token.special}
        ordinary = {i for i, token in added.items() if not token.special}
        known = self._model.get_vocab(with_added_tokens=False).values()
        self.highest = max(ordinary.union(known), default=0)
        beside = [read_beside(path.parent / name) for name in _BESIDE] if path.name == FILE else []
        self.eos = self._special("eos", EOS_NAMES, beside, special)
        self.pad = self._special("pad", PAD_NAMES, beside, special)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        return [found.ids for found in self._model.encode_batch_fast(texts)]

    def name(self, i: int) -> str:
        """How the file writes an id."""
        return _shown(self._model.id_to_token(i) or "")

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens give none."""
        return self._model.decode(ids, skip_special_tokens=True)

    def _special(
        self, name: str, usual: Sequence[str], beside: list[dict[str, Any]], special: dict[str, int]
    ) -> int | None:
        """The id of `name` by the files beside, else by its usual names; None where there is none."""
        for facts in beside:
            token, number = facts.get(f"{name}_token"), facts.get(f"{name}_token_id")
            token = token.get("content") if isinstance(token, dict) else token
            number = number[0] if isinstance(number, list) and number else number
            if isinstance(token, str):
                number = special.get(token, self._model.token_to_id(token))
            if type(number) is int and 0 <= number < self.vocab_size:
                return number
        return next((special[token] for token in usual if token in special), None)


def begins(path: Path, content: bytes) -> int | None:
    """The id that a tokenizer.json puts before each text by itself, as a bos; None: no single one."""
    made = _parse(path, content, plain=False)
    plain, whole = (made.encode("A", add_special_tokens=add).ids for add in (False, True))
    first, rest = whole[:1], whole[1 : len(plain) + 1]
    return first[0] if plain and rest == plain else None


def _parse(path: Path, content: bytes, *, plain: bool = True) -> tokenizers.Tokenizer:
    """The library's tokenizer, `plain` with nothing around a text; UserError where the file is none."""
    try:
        settings = json.loads(content)
        model = settings["model"]
        settings |= {"truncation": None, "padding": None} | ({"post_processor": None} if plain else {})
        if "dropout" in model:
            model["dropout"] = None
        if plain and isinstance(model["vocab"], list):
            _hide_special_pieces(settings["added_tokens"], model["vocab"])
        made = tokenizers.Tokenizer.from_str(json.dumps(settings))
        made.encode_special_tokens = True
        made.encode("A file may be read and still fail at its first text.")
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # plain Exceptions of the library, and panics, which are not even those
        reason = str(error).partition("\n")[0][:100]
        raise UserError(f"{path} is no {FILE} ({reason}): name another file, or bpe(4096)") from error
    return made


def _hide_special_pieces(added: list[dict[str, Any]], vocab: list[list[Any]]) -> None:
    """Unigram models find a special piece in a text like any other: give it a name that no text holds."""
    place_of = {piece: place for place, (piece, _) in enumerate(vocab)}
    for token in added:
        if token["special"] and token["content"] in place_of:
            hidden = f"\0{token['content']}\0"
            vocab[place_of[token["content"]]][0] = token["content"] = hidden


def _shown(content: str) -> str:
    return content.strip("\0")


def read_beside(path: Path) -> dict[str, Any]:
    """The object in a JSON file beside a tokenizer.json, or nothing where there is no file."""
    try:
        facts = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path}, which tells a tokenizer's special tokens, cannot be read: {error}"
        ) from error
    if not isinstance(facts, dict):
        raise UserError(f"{path}, which tells a tokenizer's special tokens, is no JSON object")
    return facts
