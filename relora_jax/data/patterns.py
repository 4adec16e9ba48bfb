"""The files that a pattern names: a path, a directory, a glob pattern with {a,b} and {0..9}, or a URL.

A part of a path that exists as it is written is taken as it is written, brackets and braces included. A URL
(gs://, s3://, https://, ...) is read through fsspec.
"""

import dataclasses
import errno
import glob
import io
import os
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

from relora_jax.data import formats
from relora_jax.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class NoFilesError(UserError):
    """No file matches the pattern."""


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file that fsspec opens, with what is used of a Path."""

    system: Any
    path: str
    size: int

    def __str__(self) -> str:
        return self.system.unstrip_protocol(self.path)

    @property
    def name(self) -> str:
        """The part after the last slash."""
        return posixpath.basename(self.path)

    def stat(self) -> Any:
        """Its size, as st_size."""
        return SimpleNamespace(st_size=self.size)

    def resolve(self) -> "Remote":
        """Itself: URLs have no symbolic links."""
        return self

    def open(self, mode: str) -> io.BufferedReader:
        """A stream that can be moved; OSError if anything fails."""
        return io.BufferedReader(_RemoteStream(self), 2**20)


class _RemoteStream(io.RawIOBase):
    """Reads of a Remote, with any error of its file system as an OSError."""

    def __init__(self, file: Remote) -> None:
        self._name = str(file)
        try:
            self._file = file.system.open(file.path, "rb")
        except Exception as error:
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> OSError:
        return OSError(errno.EIO, f"{type(error).__name__}: {error}", self._name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._file.read(len(buffer))
        except Exception as error:
            raise self._failed(error) from error
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()


TextFile = Path | Remote


def matching(pattern: str, *, setting: str) -> list[TextFile]:
    """The files of a pattern, sorted by path.

    NoFilesError if a pattern, or one of the alternatives in its braces, matches none; UserError for an
    unsupported file type, which is left out only below a directory. Both name `setting`.
    """
    if "://" in pattern:
        matches = {file for part in _alternatives(pattern) for file in _remote(part, pattern, setting)}
    else:
        matches = set(_local(pattern, pattern, setting))
    files = sorted(matches, key=lambda file: PurePosixPath(str(file)))
    for file in files:
        formats.check(file, f"{setting} {pattern!r}")
    return files


def _alternatives(pattern: str) -> Iterator[str]:
    """The pattern once for each choice in its braces, as a shell expands them: {a,b}, {00..79}."""
    for match in _BRACES.finditer(pattern):
        choices = match[1].split(",") if "," in match[1] else list(_numbers(match[1]))
        if choices:
            for choice in choices:
                yield from _alternatives(pattern[: match.start()] + choice + pattern[match.end() :])
            return
    yield pattern


def _numbers(content: str) -> Iterator[str]:
    """The numbers of a range first..last, with leading zeros as in `first`."""
    if match := _RANGE.fullmatch(content):
        first, last = match.groups()
        yield from (f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1))


def _local(part: str, pattern: str, setting: str) -> Iterator[Path]:
    """The files of `part`, which is `pattern` or an alternative of it."""
    path = Path(os.path.expanduser(part))
    parent = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    if parent == path:
        yield from _below(path, setting) if path.is_dir() else [path]
        return
    rest = str(path.relative_to(parent))
    if (alternatives := list(_alternatives(rest))) != [rest]:
        for alternative in alternatives:
            yield from _local(str(parent / alternative), pattern, setting)
        return
    matches = glob.glob(os.path.join(glob.escape(str(parent)), rest), recursive=True)
    if files := [file for file in map(Path, matches) if file.is_file()]:
        yield from files
        return
    if matches:
        raise NoFilesError(f"{_quoted(part, pattern, setting)} matches only directories: add /** to it")
    raise NoFilesError(
        f"{_quoted(part, pattern, setting)} matches no file (working directory {os.getcwd()}): quote the "
        "pattern, and use ** for nested folders"
    )


def _quoted(part: str, pattern: str, setting: str) -> str:
    return f"{setting} {pattern!r}" if part == pattern else f"{part!r} of {setting} {pattern!r}"


def _below(folder: Path, setting: str) -> Iterator[Path]:
    """The text files in a directory and, through links as well, in those below it; not the hidden ones."""
    paths, visited = list[Path](), set[str]()
    for root, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(root)) in visited:  # a link to a directory above it
            folders.clear()
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(root, name) for name in names]
    yield from _known(paths, folder, setting)


def _raise(error: OSError) -> None:
    raise error


def _known(files: Iterable[Any], folder: object, setting: str) -> list[Any]:
    """The files of a known type that are not hidden; NoFilesError if there are none."""
    known = [file for file in files if formats.is_known(file.name) and not file.name.startswith(".")]
    if not known:
        raise NoFilesError(f"{setting}: no file below {folder} has a known type, {formats.KNOWN}")
    return known


def _remote(url: str, pattern: str, setting: str) -> list[Remote]:
    """The files at a URL, which may be a directory or have a glob pattern."""
    import fsspec  # takes a while: only if it is used

    try:
        system, path = fsspec.core.url_to_fs(url)
        is_file = system.isfile(path)
        is_folder = not is_file and system.isdir(path)
        if is_file:
            listed = {path: system.info(path)}
        else:
            listed = system.find(path, detail=True) if is_folder else system.glob(path, detail=True)
    except ImportError as error:
        raise UserError(
            f"{_quoted(url, pattern, setting)} cannot be read without another package ({error}): install it "
            "with pip, or copy the files to a local disk"
        ) from error
    except FileNotFoundError as error:
        raise NoFilesError(f"{_quoted(url, pattern, setting)} matches no file ({error})") from error
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else UserError
        raise kind(
            f"{_quoted(url, pattern, setting)} cannot be listed ({type(error).__name__}: {error}): check the "
            "address and your credentials, or copy the files to a local disk"
        ) from error
    files = [
        Remote(system, name, _size(system, name, info))
        for name, info in listed.items()
        if info["type"] == "file"
    ]
    if is_folder:
        hidden = lambda file: "/." in file.path.removeprefix(path)  # noqa: E731
        return _known([file for file in files if not hidden(file)], url, setting)
    if not files:
        raise NoFilesError(f"{_quoted(url, pattern, setting)} matches no file: use ** for nested folders")
    return files


def _size(system: Any, name: str, info: dict[str, Any]) -> int:
    """The size of a file, which listings of some servers leave out."""
    size = info["size"] if info.get("size") is not None else system.info(name).get("size")
    if size is None:
        raise UserError(f"the server of {name} does not report its size: copy the file to a local disk")
    return size
