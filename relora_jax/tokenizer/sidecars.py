"""The JSON files that transformers puts next to a tokenizer: they define special and added tokens."""

import json
from pathlib import Path
from typing import Any

from relora_jax.errors import UserError

CONFIG, SPECIAL, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# files that may define the special ids, in order of precedence
FILES = (CONFIG, SPECIAL, "generation_config.json", "config.json")
NAMES = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
EXTRA = ("extra_special_tokens", "additional_special_tokens")
DECODER = "added_tokens_decoder"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
TEMPLATES, FOLDER = ("chat_template.jinja", "chat_template.json"), "additional_chat_templates"


def read(path: Path) -> dict[str, Any]:
    """The object in a JSON file, with tokens that `content` can read; empty if there is no file."""
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
    if invalid := _invalid(path.name, settings):
        raise UserError(
            f"{path} defines a tokenizer's special tokens, and {invalid} in it is not valid: correct it"
        )
    return settings


def content(token: Any) -> Any:
    """The text of a special token in a settings file, where it may be an object."""
    return token.get("content") if isinstance(token, dict) else token


def has_template(folder: Path) -> bool:
    """Whether the files define a chat template."""
    paths = (*TEMPLATES, FOLDER)
    return bool(read(folder / CONFIG).get("chat_template")) or any((folder / path).exists() for path in paths)


def _invalid(name: str, settings: dict[str, Any]) -> str:
    """The name of the first setting that defines tokens in another form than transformers'."""
    if name == ADDED:
        return next((repr(text) for text, i in settings.items() if type(i) is not int), "")
    for key, value in settings.items():
        is_valid = True
        if key in NAMES or (key.endswith("_token") and isinstance(value, dict)):
            is_valid = value is None or isinstance(value, str) or _is_token(value)
        elif key in EXTRA and isinstance(value, list):
            is_valid = all(isinstance(token, str) or _is_token(token) for token in value)
        elif key == DECODER and value is not None:
            is_valid = isinstance(value, dict) and all(i.isdecimal() for i in value)
            is_valid = is_valid and all(map(_is_token, value.values()))
        if not is_valid:
            return key
    return ""


def _is_token(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        return False
    return all(isinstance(value[flag], bool) for flag in value.keys() & {*FLAGS})
