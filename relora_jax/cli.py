"""Parses --config=FILE[:ARM] [--config.GROUP.FIELD=VALUE ...] into a Config; any mistake is a one-line error.

It applies `ml_collections.config_flags` to the dataclasses of config.py, with separate flag values per call,
so that a command can be imported and run more than once in a process.
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
from typing import Any, TypeVar

from absl import flags
from ml_collections import config_flags

from relora_jax.config import ARMS, Config, check_types
from relora_jax.core import prune
from relora_jax.core.grammar import Choice
from relora_jax.errors import BAD_SETTING, NO_DATA, UserError
from relora_jax.storage.location import is_store_error

SHORTHANDS = ("text", "text_field", "validation_text")  # --text=X is --config.data.text=X
MAX_ERROR_LENGTH = 2000  # characters
K = TypeVar("K")


class ArgumentParser(argparse.ArgumentParser):
    """argparse for commands without --config: a mistake raises UserError, which `main` prints."""

    def __init__(self) -> None:
        super().__init__(add_help=False, allow_abbrev=False)  # `main` prints the help

    def error(self, message: str) -> Any:
        """Raises a UserError."""
        raise UserError(message)


class _PruneParser(flags.ArgumentParser):
    """Parses a flag with the grammar of prune.py."""

    def parse(self, argument: Any) -> prune.Prune:
        return argument if isinstance(argument, prune.Prune) else prune.parse(argument)

    def flag_type(self) -> str:
        return "prune"


config_flags.register_flag_parser_for_type(prune.Prune, _PruneParser())  # pyright: ignore


def parse(argv: Sequence[str], **defaults: str | bool) -> tuple[Config, dict[str, Any]]:
    """(config, values of the flags `name=default`) from a command line; UserError for a mistake."""
    config, values = parse_as(Config, argv, defaults)
    check_types(config)
    return config, values


def parse_as(kind: type[K], argv: Sequence[str], defaults: dict[str, str | bool]) -> tuple[K, dict[str, Any]]:
    """As `parse`, for a config file that returns a dataclass of this type; its values are not checked."""
    argv = _expand_shorthands(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=list(argv), lock_config=False)
    _define(defaults, values)
    _check_config_file(argv, arms=ARMS if kind is Config else ())
    _check_keys(argv, kind)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*load_module", DeprecationWarning)  # from ml_collections
            rest = values(list(argv))[1:]
        config = values["config"].value
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"{_one_line(error)}; write settings as --config.group.field=value") from None
    except (flags.Error, ValueError, TypeError) as error:
        text = _one_line(error)
        if "get_config() takes 0 positional arguments" in text:
            text = "the config file offers no choice: leave out the colon and what follows it"
        raise UserError(text) from None
    except Exception as error:
        raise UserError(f"cannot read the config: {type(error).__name__}: {_one_line(error)}") from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: write every setting as --name=value")
    if not isinstance(config, kind):
        raise UserError(f"get_config(arm) in the config file must return a {kind.__module__}.{kind.__name__}")
    return config, {name: values[name].value for name in defaults}


def options(argv: Sequence[str], **defaults: str | bool) -> dict[str, Any]:
    """The values of the flags `name=default` of a command without --config; UserError for a mistake."""
    values = flags.FlagValues()
    _define(defaults, values)
    try:
        rest = values(list(argv))[1:]
    except flags.Error as error:
        raise UserError(_one_line(error)) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}: quote patterns, and write flags as --name=value")
    return {name: values[name].value for name in defaults}


def _define(defaults: dict[str, str | bool], values: flags.FlagValues) -> None:
    for name, default in defaults.items():
        define: Any = flags.DEFINE_boolean if isinstance(default, bool) else flags.DEFINE_string
        define(name, default, "", flag_values=values)


def count(name: str, value: str, *, at_least: int) -> int:
    """The value of the flag `name` as an integer; UserError if it is not one or is below `at_least`."""
    if not value.isdecimal() or int(value) < at_least:
        raise UserError(f"--{name}={value} must be an integer of at least {at_least}")
    return int(value)


def main(
    run: Callable[[list[str]], int],
    usage: str | None,
    argv: list[str] | None = None,
    *,
    leave: Callable[[int], Any] = sys.exit,
) -> None:
    """Leaves with the code of `run(argv)`, or with one line and 2 for a UserError, 74 for an OSError.

    Any other exception is a bug and shows its traceback.
    """
    argv = sys.argv if argv is None else argv
    if {"-h", "--help"} & set(argv[1:]):
        print(usage)
        sys.exit(0)
    try:
        code = run(argv)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = BAD_SETTING
    except Exception as error:
        if not isinstance(error, OSError) and not is_store_error(error):
            raise
        too_many = os.strerror(errno.EMFILE) in str(error)
        remedy = "raise the limit on open files (ulimit -n)" if too_many else "fix the disk or the data"
        remedy = "start them all" if isinstance(error, ConnectionError) else remedy
        print(f"error: {_one_line(error)}: {remedy}, then run the same command again", file=sys.stderr)
        code = NO_DATA
    except KeyboardInterrupt:
        print("interrupted: run the same command again to resume", file=sys.stderr)
        code = 130
    leave(code)


def command(module: str, argv: Sequence[str]) -> str:
    """The shell command that starts `module` with the settings in the command line `argv`."""
    args, settings = _expand_shorthands(argv)[1:], []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue="-"):
        if arg.startswith("-") and arg.lstrip("-").startswith("config"):
            settings.append(arg if "=" in arg or following.startswith("-") else f"{arg}={following}")
    return shlex.join(["python", "-m", f"relora_jax.{module}", *settings])


def with_arm(argv: Sequence[str], arm: str) -> list[str]:
    """The command line with --config=FILE:arm in place of --config=FILE[:ARM]."""
    args = list(argv)
    for i, arg in enumerate(args):
        if arg.startswith(("--config=", "-config=")) or (i and args[i - 1] in ("--config", "-config")):
            args[i] = f"{arg.partition(':')[0]}:{arm}"
    return args


def _expand_shorthands(argv: Sequence[str]) -> list[str]:
    """The command line with --text=X etc. as --config.data.text=X at its end; UserError if X is missing."""
    args, settings = list(argv), []
    for name in SHORTHANDS:
        for arg in [a for a in args[1:] if a.startswith("-") and a.lstrip("-").partition("=")[0] == name]:
            i = args.index(arg)
            value = arg.partition("=")[2] if "=" in arg else "".join(args[i + 1 : i + 2])
            if not value or ("=" not in arg and value.startswith("-")):
                raise UserError(f"--{name} has no value: write --{name}=VALUE, or omit it")
            del args[i : i + (1 if "=" in arg else 2)]
            settings.append(f"--config.data.{name}={value}")
    return args + settings


def _check_config_file(argv: Sequence[str], *, arms: Sequence[str]) -> None:
    paths = [a.lstrip("-").partition("=")[2] for a in argv if a.startswith(("--config=", "-config="))]
    paths += [b for a, b in itertools.pairwise(argv) if a in ("--config", "-config")]
    if not paths:
        raise UserError(
            "--config is missing: pass --config=configs/quickstart.py or another file of configs/"
        )
    path, _, arm = paths[-1].partition(":")
    if not pathlib.Path(path).is_file():
        available = ", ".join(sorted(map(str, pathlib.Path("configs").glob("*.py"))))
        remedy = f"choose one of {available}" if available else "pass the path of an existing file"
        raise UserError(f"config file {path!r} not found: {remedy}")
    if arm and arms and arm not in arms:
        raise UserError(f"unknown arm {arm!r}: write {path}:ARM with ARM one of {', '.join(arms)}")


def _check_keys(argv: Sequence[str], root: type[Any]) -> None:
    """UserError for a --config.KEY that config.py does not define, with the fields that it does."""
    for arg in argv:
        path = arg.lstrip("-").removeprefix("no").partition("=")[0].split(".")
        if not arg.startswith("-") or path[0] != "config":
            continue
        kind: Any = root
        for name in path[1:]:
            names = {field.name: field.type for field in dataclasses.fields(kind)} if _is_group(kind) else {}
            if name not in names:
                remedy = f": choose one of {', '.join(names)}" if names else ""
                raise UserError(
                    f"unknown setting {'.'.join(path)}: {kind.__name__} has no field {name!r}{remedy}"
                )
            kind = names[name]


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind) and not issubclass(kind, Choice)


def _one_line(error: BaseException) -> str:
    """The error's message as one line of bounded length: it may quote anything."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    # ml_collections appends the traceback of a failing config file
    before, _, trace = text.partition("Traceback (most recent call last):")
    text = " ".join((before + trace.strip().splitlines()[-1] if trace.strip() else text).split())
    return text if len(text) <= MAX_ERROR_LENGTH else f"{text[:MAX_ERROR_LENGTH]}..."
