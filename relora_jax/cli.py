"""--config=FILE[:ARM] [--config.GROUP.FIELD=VALUE ...] as a Config: one line of error for any mistake.

`ml_collections.config_flags` over the dataclasses of config.py, in flags of its own, so that each command
can be imported and run twice in a process.
"""

import argparse
import dataclasses
import errno
import itertools
import os
import pathlib
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from relora_jax.config import ARMS, Config, check_types
from relora_jax.core import prune
from relora_jax.core.grammar import Choice
from relora_jax.errors import BAD_SETTING, NO_DATA, UserError

SHORTHANDS = ("text", "text_field", "validation_text")  # --text=X is --config.data.text=X
LONGEST_LINE = 2000  # characters of an error


class Words(argparse.ArgumentParser):
    """argparse for the commands that take no --config: a mistake is a UserError, as `main` prints it."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)  # `main` prints the help

    def error(self, message: str) -> Any:
        """Raises it."""
        raise UserError(message)


class _PruneParser(flags.ArgumentParser):
    """The grammar of prune.py on the command line."""

    def parse(self, argument: Any) -> prune.Prune:
        return argument if isinstance(argument, prune.Prune) else prune.parse(argument)

    def flag_type(self) -> str:
        return "prune"


config_flags.register_flag_parser_for_type(prune.Prune, _PruneParser())  # pyright: ignore


def parse(argv: Sequence[str], **strings: str) -> tuple[Config, dict[str, str]]:
    """(config, the values of the string flags `name=default`) of a command line; UserError otherwise."""
    argv = _written_out(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=list(argv), lock_config=False)
    for name, default in strings.items():
        flags.DEFINE_string(name, default, "", flag_values=values)
    _check_config_file(argv)
    _check_keys(argv)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)  # ml_collections' own
            rest = values(list(argv))[1:]
        config = values["config"].value
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{_text(error)}; settings are written --config.group.field=value") from None
    except (flags.Error, ValueError, TypeError) as error:
        raise UserError(_text(error)) from None
    except Exception as error:
        raise UserError(f"the config cannot be read: {type(error).__name__}: {_text(error)}") from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: every setting is written --name=value")
    if not isinstance(config, Config):
        raise UserError("get_config(arm) of the config file must return a relora_jax.config.Config")
    check_types(config)
    return config, {name: str(values[name].value) for name in strings}


def options(argv: Sequence[str], **defaults: str | bool) -> dict[str, Any]:
    """The values of the flags `name=default` of a command without a config; UserError otherwise."""
    values = flags.FlagValues()
    for name, default in defaults.items():
        define: Any = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, "", flag_values=values)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(_text(error)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: quote patterns, and write --name=value")
    return {name: values[name].value for name in defaults}


def count(name: str, value: str, *, at_least: int) -> int:
    """The whole number that the flag `name` gives; UserError where it gives none."""
    if not value.isdecimal() or int(value) < at_least:
        raise UserError(f"--{name}={value} is no whole number from {at_least} on")
    return int(value)


def main(run: Callable[[list[str]], int], usage: str | None, argv: list[str] | None = None) -> None:
    """Exit with what `run(argv)` returns; a UserError gives a line and 2, an OSError one and 74.

    Any other exception is a bug, and its trace tells where.
    """
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"} & set(argv[1:]):
        print(usage)
        sys.exit(0)
    try:
        code = run(argv)
    except UserError as error:
        print(f"error: {_text(error)}", file=sys.stderr)
        code = BAD_SETTING
    except OSError as error:
        too_many = os.strerror(errno.EMFILE) in str(error)
        remedy = "raise the limit of open files (ulimit -n)" if too_many else "mend the disk or the data"
        print(f"error: {_text(error)}: {remedy}, and the same command goes on", file=sys.stderr)
        code = NO_DATA
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        code = 130
    sys.exit(code)


def command(module: str, argv: Sequence[str]) -> str:
    """The line for a shell that starts `module` with the settings of the command line `argv`."""
    kept = []
    for word, after in itertools.zip_longest(given := _written_out(argv)[1:], given[1:], fillvalue="-"):
        if word.startswith("-") and word.lstrip("-").startswith("config"):
            kept.append(word if "=" in word or after.startswith("-") else f"{word}={after}")
    return shlex.join(["python", "-m", f"relora_jax.{module}", *kept])


def _written_out(argv: Sequence[str]) -> list[str]:
    """The command line with --text=X as --config.data.text=X, and so on, at its end; UserError without X."""
    words, settings = list(argv), []
    for name in SHORTHANDS:
        for word in [w for w in words[1:] if w.startswith("-") and w.lstrip("-").partition("=")[0] == name]:
            at = words.index(word)
            value = word.partition("=")[2] if "=" in word else "".join(words[at + 1 : at + 2])
            if not value or ("=" not in word and value.startswith("-")):
                raise UserError(f"--{name} names nothing: write --{name}=VALUE, or leave it out")
            del words[at : at + (1 if "=" in word else 2)]
            settings.append(f"--config.data.{name}={value}")
    return words + settings


def _check_config_file(argv: Sequence[str]) -> None:
    given = [a.lstrip("-").partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
    given += [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
    if not given:
        raise UserError("say what to run: --config=configs/quickstart.py, or another file of configs/")
    name, _, arm = given[-1].partition(":")
    if not pathlib.Path(name).is_file():
        near = ", ".join(sorted(map(str, pathlib.Path("configs").glob("*.py")))) or "none in configs/"
        raise UserError(f"config file {name!r} does not exist; there are: {near}")
    if arm and arm not in ARMS:
        raise UserError(f"unknown arm {arm!r}: write {name}:ARM with ARM one of {', '.join(ARMS)}")


def _check_keys(argv: Sequence[str]) -> None:
    """UserError for a --config.KEY that config.py does not have, with those that it has."""
    for word in argv:
        path = word.lstrip("-").removeprefix("no").partition("=")[0].split(".")
        if not word.startswith("-") or path[0] != "config":
            continue
        kind: Any = Config
        for name in path[1:]:
            names = {field.name: field.type for field in dataclasses.fields(kind)} if _is_group(kind) else {}
            if name not in names:
                has = f"; it has {', '.join(names)}" if names else ""
                raise UserError(f"unknown setting {'.'.join(path)}: no {name!r} in {kind.__name__}{has}")
            kind = names[name]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and not issubclass(kind, Choice)


def _text(error: BaseException) -> str:
    """The error as one line, of a length that can be read: what it quotes may come from anywhere."""
    said = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    before, _, trace = said.partition(
        "Traceback (most recent call last):"
    )  # ml_collections', of a config file
    said = " ".join((before + trace.strip().splitlines()[-1] if trace.strip() else said).split())
    return said if len(said) <= LONGEST_LINE else f"{said[:LONGEST_LINE]}..."
