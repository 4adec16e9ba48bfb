"""Which files a pattern names: literal paths, directories, braces, globs and URLs."""

import os
import pathlib
import sys
from unittest.mock import Mock

import fsspec
import pytest

from relora_jax.data import file_source, patterns
from relora_jax.data.patterns import NoFilesError
from relora_jax.errors import UserError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Text files, each with its own path as content, in a working directory."""
    monkeypatch.chdir(tmp_path)
    names = [
        "a/1.txt",
        "a/2.jsonl",
        "a/b/3.csv.gz",
        "a/b/README.md",
        "a/.hidden.txt",
        "a/.cache/4.txt",
        "c/1.txt",
        "c-x/1.txt",
        "run[1]/x{1,2}.txt",
        "run[1]/y.txt",
        "run1/z.txt",
        "0098.txt",
        "0099.txt",
        "0100.txt",
    ]
    for name in names:
        pathlib.Path(name).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(name).write_text(name)
    return tmp_path


def names(pattern, root=""):
    files = patterns.matching(pattern, setting="data.text")
    return [str(file).removeprefix(f"{root}/") for file in files]


PATTERNS = {
    "a": ["a/1.txt", "a/2.jsonl", "a/b/3.csv.gz"],
    "a/": ["a/1.txt", "a/2.jsonl", "a/b/3.csv.gz"],
    "a/b": ["a/b/3.csv.gz"],
    "a/.hidden.txt": ["a/.hidden.txt"],
    "a/.cache": ["a/.cache/4.txt"],
    "a/*": ["a/1.txt", "a/2.jsonl"],
    "{a,c}/1.txt": ["a/1.txt", "c/1.txt"],
    "{a,c}": ["a/1.txt", "a/2.jsonl", "a/b/3.csv.gz", "c/1.txt"],
    "{c,a/{b,1.txt}}": ["a/1.txt", "a/b/3.csv.gz", "c/1.txt"],
    "c{,-x}/*.txt": ["c/1.txt", "c-x/1.txt"],
    "{0099..0100}.txt": ["0099.txt", "0100.txt"],
    "00{98..99}.txt": ["0098.txt", "0099.txt"],
    "run[1]": ["run[1]/x{1,2}.txt", "run[1]/y.txt"],
    "run[1]/*": ["run[1]/x{1,2}.txt", "run[1]/y.txt"],
    "run[1]/{x*,y.txt}": ["run[1]/x{1,2}.txt", "run[1]/y.txt"],
    "run[1]/x{1,2}.txt": ["run[1]/x{1,2}.txt"],
    "ru[n]1/*": ["run1/z.txt"],
    "*/1.txt": ["a/1.txt", "c/1.txt", "c-x/1.txt"],
    "./c/../c/1.txt": ["c/../c/1.txt"],
}


@pytest.mark.parametrize(("pattern", "expected"), PATTERNS.items())
def test_pattern_names_its_files_in_the_order_of_their_paths(tree, pattern, expected):
    assert names(pattern) == expected
    absolute = pattern if pattern.startswith("{") else f"{tree}/{pattern}"
    assert names(absolute, tree) == expected


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{a,d}/1.txt", "'d/1.txt' of data.text '{a,d}/1.txt' matches no file (working directory "),
        ("{5..9}.txt", "'5.txt' of data.text '{5..9}.txt' matches no file"),
        ("b", "data.text 'b' matches no file (working directory "),
        ("{a}", "data.text '{a}' matches no file"),
        (
            "empty",
            "data.text: no file below empty has a known type, .jsonl, .json, .txt,",
        ),
        ("a/[b]", "data.text 'a/[b]' matches only directories: add /** to it"),
        ("a/b/*", "a/b/README.md of data.text 'a/b/*' has an unsupported file type: use .jsonl"),
        ("a/b/README.md", "a/b/README.md of data.text 'a/b/README.md' has an unsupported file type"),
    ],
)
def test_pattern_without_text_files_is_named(tree, pattern, message):
    (tree / "empty/.git").mkdir(parents=True)
    (tree / "empty/.git/x.txt").touch()
    with pytest.raises(UserError) as raised:
        names(pattern)
    assert message in str(raised.value) and isinstance(raised.value, NoFilesError) == (
        "unsupported" not in message
    )


def test_links_below_a_directory_are_followed_once(tree):
    (tree / "a/b/up").symlink_to(tree / "a")
    (tree / "a/d").symlink_to(tree / "c")
    (tree / "a/e.txt").symlink_to(tree / "0099.txt")
    assert names("a") == ["a/1.txt", "a/2.jsonl", "a/b/3.csv.gz", "a/d/1.txt", "a/e.txt"]


def test_unreadable_directory_is_not_left_out(tree, monkeypatch):
    scandir = os.scandir

    def failing(path):
        if str(path).endswith("a/b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PermissionError):
        names("a")


def test_name_that_is_not_utf8_is_read_and_has_a_fingerprint(tree):
    name = os.fsdecode(b"caf\xe9.txt")
    (tree / "a" / name).write_text("text")
    for pattern in (f"a/{name}", "a/caf*", "{a/caf*,c/1.txt}"):
        source = file_source.find(pattern, field="text", validation_fraction=0.1)
        assert source.paths[0].name == name and len(source.fingerprint()) == 64
        assert next(next(source.blocks(0))).texts == ["text"]


@pytest.fixture
def memory():
    """fsspec's file system in memory, with the files of a bucket."""
    system = fsspec.filesystem("memory")
    for name in ("b/1.jsonl", "b/2.txt", "b/x/3.txt.gz", "b/x/README", "b/.h/4.txt", "b/.5.txt", "b/[6].txt"):
        system.pipe(name, b'{"text": "a"}\n' * 20_000)
    yield system
    system.rm("/b", recursive=True)


URLS = {
    "memory://b/1.jsonl": ["b/1.jsonl"],
    "memory://b": ["b/1.jsonl", "b/2.txt", "b/[6].txt", "b/x/3.txt.gz"],
    "memory://b/x": ["b/x/3.txt.gz"],
    "memory://b/*.txt": ["b/.5.txt", "b/2.txt", "b/[6].txt"],
    "memory://b/{1.jsonl,2.*}": ["b/1.jsonl", "b/2.txt"],
    "memory://b/[6].txt": ["b/[6].txt"],
    "memory://{b/2,b/x/3}.t*": ["b/2.txt", "b/x/3.txt.gz"],
}


@pytest.mark.parametrize(("url", "expected"), URLS.items())
def test_url_names_its_files(memory, url, expected):
    assert names(url, "memory://") == expected


def test_remote_file_is_read_like_a_local_one(memory, tmp_path):
    (tmp_path / "1.jsonl").write_bytes(memory.cat("b/1.jsonl"))
    remote, local = (
        file_source.find(pattern, field="text", validation_fraction=0.1)
        for pattern in ("memory://b/1.jsonl", str(tmp_path / "1.jsonl"))
    )
    assert remote.fingerprint() == local.fingerprint() and remote.bytes == local.bytes
    assert list(remote.train_texts()) == list(local.train_texts())
    assert len(remote.stripes(4)) == 1 and len(local.stripes(4)) == 4
    assert sum(chunk.size for chunks in remote.blocks(0) for chunk in chunks) == pytest.approx(
        remote.size, rel=0.05
    )


@pytest.mark.parametrize("name", ["1.jsonl", "2.txt", "x/3.txt.gz"])
@pytest.mark.parametrize("error", [RuntimeError("timed out"), FileNotFoundError("gone"), OSError(5, "reset")])
def test_failure_of_the_network_is_not_reported_as_damage(memory, monkeypatch, name, error):
    source = file_source.find(f"memory://b/{name}", field="text", validation_fraction=0.1)
    monkeypatch.setattr(memory, "open", lambda *_: Failing(error))
    with pytest.raises(OSError, match=r"(timed out|gone|reset).*memory://.*b/"):
        list(source.train_texts())


class Failing:
    def __init__(self, error):
        self.error = error

    def read(self, _):
        raise self.error

    def close(self):
        pass


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "gs://bucket/a.jsonl",
            "'gs://bucket/a.jsonl' cannot be read without another package (.*gcsfs",
        ),
        (
            "what://x/a.jsonl",
            "'what://x/a.jsonl' cannot be listed (ValueError: Protocol not known: what",
        ),
        ("memory://b/9*.txt", "data.text 'memory://b/9*.txt' matches no file"),
        (
            "memory://b/{1.jsonl,9.txt}",
            "'memory://b/9.txt' of data.text 'memory://b/{1.jsonl,9",
        ),
        ("memory://b/x/README", "b/x/README of data.text 'memory://b/x/README' has an unsupported file type"),
    ],
)
def test_url_that_cannot_be_read_is_named(memory, monkeypatch, url, message):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UserError) as raised:
        names(url)
    assert all(part in str(raised.value) for part in message.split(".*"))


def test_listing_that_fails_is_named(memory, monkeypatch):
    for error, kind in ((FileNotFoundError("b"), NoFilesError), (OSError("no net"), OSError)):
        monkeypatch.setattr(memory, "glob", Mock(side_effect=error))
        with pytest.raises(kind, match=rf"data\.text 'memory://b/\*\.txt' .*{error}"):
            names("memory://b/*.txt")
    monkeypatch.setattr(memory, "glob", Mock(side_effect=KeyError("401")))
    with pytest.raises(
        UserError, match=r"cannot be listed \(KeyError: '401'\): check the address and your cred"
    ):
        names("memory://b/*.txt")


def test_size_is_asked_for_if_a_listing_leaves_it_out(memory, monkeypatch):
    monkeypatch.setattr(memory, "glob", lambda path, detail: {"b/2.txt": {"size": None, "type": "file"}})
    [file] = patterns.matching("memory://b/*.txt", setting="data.text")
    assert file.stat().st_size == 280_000


def test_file_of_unknown_size_is_refused(memory, monkeypatch):
    monkeypatch.setattr(memory, "info", lambda path: {"name": path, "size": None, "type": "file"})
    with pytest.raises(UserError, match=r"the server of /?b/1\.jsonl does not report its size: copy"):
        names("memory://b/1.jsonl")
