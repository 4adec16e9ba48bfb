"""Saved tensors are read back exactly, and invalid files are rejected."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from relora_jax import cli
from relora_jax.hf import tensor_files
from relora_jax.hf.tensor_files import FILE, INDEX, TensorFiles
from tests.support.tensors import write_tensors as write

ARRAYS = {  # names whose lexical order is not their numerical order
    "model.layers.9.norm": np.arange(5, dtype=np.float32),
    "model.layers.10.norm": np.arange(5, dtype=np.float32) / 3,
    "head": (np.arange(6).reshape(2, 3) / 7).astype(ml_dtypes.bfloat16),
    "z": np.float16([[1.5], [-0.0], [np.inf]]),
    "scalar": np.array(4.25, np.float32),
    "é": np.float32([np.nan, -1e-45]),
}


def kinds(arrays: dict[str, np.ndarray]) -> dict[str, tensor_files.Kind]:
    return {name: (array.shape, array.dtype) for name, array in arrays.items()}


def same(one: np.ndarray, other: np.ndarray) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype) and one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    "limit, shards",
    {10**9: 1, 66: 2, 48: 2, 40: 2, 23: 4, 19: 4, 1: 6}.items(),  # of 20, 20, 12, 6, 4 and 8 bytes
)
def test_saved_tensors_are_read_back_from_any_number_of_files(
    tmp_path: pathlib.Path, limit: int, shards: int
) -> None:
    write(tmp_path, ARRAYS, shard_bytes=limit)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    several = [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    assert files == ([FILE] if shards == 1 else several)
    reopened = TensorFiles.open(tmp_path)
    assert reopened.kinds == kinds(ARRAYS)
    assert all(same(reopened.read(name), array) for name, array in ARRAYS.items())
    for file in files:
        shard = load_file(tmp_path / file)
        assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= limit
    if shards > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"] == {"total_parameters": 22, "total_size": 70}
        assert {name: name in load_file(tmp_path / file) for name, file in index["weight_map"].items()} == {
            name: True for name in ARRAYS
        }


def test_saved_file_has_default_permissions(tmp_path: pathlib.Path) -> None:
    (tmp_path / "other").touch()
    tensor_files.save(tmp_path, [lambda: {"w": np.zeros(3, np.float32)}])
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["model.safetensors"] == modes["other"]


def test_shards_without_an_index_are_not_a_model(tmp_path: pathlib.Path) -> None:
    def failing() -> dict[str, np.ndarray]:
        raise OSError("disk lost")

    with pytest.raises(OSError, match="disk lost"):
        tensor_files.save(tmp_path, [lambda: {"a": np.zeros(2, np.float32)}, failing])
    assert not (tmp_path / INDEX).exists()
    with pytest.raises(ValueError, match=r"has no model\.safetensors or"):
        TensorFiles.open(tmp_path)


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: pathlib.Path) -> None:
    code = (
        "import numpy as np, pathlib, resource, sys; from relora_jax.hf import tensor_files\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
        "a = np.zeros(50_000, np.float32)\n"
        "try:\n"
        f"    tensor_files.save(pathlib.Path({str(tmp_path)!r}), [lambda: {{'a': a}}])\n"
        "except OSError as error: sys.exit(str(error))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "File too large" in run.stderr and str(tmp_path / FILE) in run.stderr, run.stderr


def test_reading_takes_the_memory_of_one_tensor(tmp_path: pathlib.Path) -> None:
    arrays = {f"t{i}": np.full((1024, 1024), i, np.float32) for i in range(16)}
    write(tmp_path, arrays)
    code = (
        "import resource, sys; from relora_jax.hf.tensor_files import TensorFiles\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        f"files = TensorFiles.open({str(tmp_path)!r}); before = peak()\n"
        "for name in files.kinds: array = files.read(name); array += 1\n"
        "print(peak() - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 4 * arrays["t0"].nbytes  # of 16 tensors


def framed(header: Any, body: bytes = b"", *, claimed: int | None = None) -> bytes:
    """A file with the header, an object or its JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + body


def one(shape: Any, offsets: Any, kind: Any = "F32", *, size: int = 4) -> bytes:
    """A file with one tensor."""
    return framed({"a": {"dtype": kind, "shape": shape, "data_offsets": offsets}}, bytes(size))


def two(first: Any, second: Any, *, size: int) -> bytes:
    """A file with two float32 tensors at these offsets."""
    tensors = {
        name: {"dtype": "F32", "shape": [(b - a) // 4], "data_offsets": [a, b]}
        for name, (a, b) in {"a": first, "b": second}.items()
    }
    return framed(tensors, bytes(size))


GOOD = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FILES = {
    "an empty file": (b"", "truncated or invalid"),
    "a file of 7 bytes": (bytes(7), "truncated or invalid"),
    "a header of no length": (framed(b"", bytes(4)), "truncated or invalid"),
    "a header longer than the file": (framed({}, claimed=1000), "invalid header length"),
    "a header of 2^63 bytes": (framed({}, claimed=2**63), "claims 9,223,372,036,854,775,808 bytes"),
    "a header of 2^64 - 1 bytes": (framed({}, claimed=2**64 - 1), "claims 18,446"),
    "a header of 99 MB": (framed({}, claimed=99_000_000), "claims 99,000,000 bytes"),
    "a header that is not JSON": (framed(b"GGUF"), "invalid JSON"),
    "a header that is not text": (framed(b'{"\xff": 1}'), "truncated or invalid"),
    "a header that is a list": (framed([]), "truncated or invalid"),
    "a header of deep brackets": (
        framed(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
        "truncated or invalid",
    ),
    "deep brackets in an unused key": (
        framed(b'{"a":' + GOOD[:-1] + b',"x":' + b"[" * 10**5 + b"]" * 10**5 + b"}}", bytes(4)),
        "truncated or invalid",
    ),
    "digits in an unused key": (
        framed(b'{"a":' + GOOD[:-1] + b',"x":' + b"9" * 10**5 + b"}}", bytes(4)),
        "truncated or invalid",
    ),
    "a pickle": (b"\x80\x04\x95cos\nsystem\n(S'true'\ntR.", "truncated or invalid"),
    "a tensor that is a number": (framed({"a": 3}), "truncated or invalid"),
    "a tensor without offsets": (framed({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "data_offsets"),
    "the same name twice": (framed(b'{"a":' + GOOD + b',"a":' + GOOD + b"}", bytes(4)), "duplicate key 'a'"),
    "the same name with another shape": (
        framed(b'{"a":' + GOOD.replace(b"[1]", b"[7]") + b',"a":' + GOOD + b"}", bytes(4)),
        "duplicate key 'a'",
    ),
    "tensors that overlap": (two((0, 8), (4, 12), size=12), "invalid offset"),
    "tensors with the same offsets": (two((0, 8), (0, 8), size=8), "invalid offset"),
    "a hole between tensors": (two((0, 4), (8, 12), size=12), "invalid offset"),
    "a hole before": (one([1], [4, 8], size=8), "invalid offset"),
    "bytes after the last tensor": (one([1], [0, 4], size=5), "not fully covered"),
    "offsets beyond the file": (one([1], [10**15, 10**15 + 4]), "invalid offset"),
    "a tensor that ends beyond the file": (one([2], [0, 8]), "not fully covered"),
    "offsets in reverse": (one([1], [4, 0]), "invalid offset"),
    "negative offsets": (one([1], [-4, 0]), "invalid JSON"),
    "a shape of another size": (one([3], [0, 4]), "invalid shape"),
    "a shape of 2^80 values": (one([2**40, 2**40], [0, 4]), "overflow"),
    "a shape of 2^64": (one([2**64], [0, 4]), "truncated or invalid"),
    "a shape whose bytes wrap around to 4": (one([2**62 + 1], [0, 4]), "overflow"),
    "a huge empty shape": (one([2**62, 0], [0, 0], size=0), "unsupported shape"),
    "an empty tensor": (one([0], [0, 0], size=0), "unsupported shape"),
    "a hundred axes": (one([1] * 100, [0, 4]), "unsupported shape"),
    "a negative axis": (one([-1], [0, 4]), "truncated or invalid"),
    "two negative axes": (one([-1, -1], [0, 4]), "truncated or invalid"),
    "an axis of 1.0": (one([1.0], [0, 4]), "truncated or invalid"),
    "an axis that is a text": (one(["1"], [0, 4]), "truncated or invalid"),
    "an unknown type": (one([1], [0, 4], "F99"), "unknown variant"),
    "integers": (one([1], [0, 4], "I32"), "'a' has dtype I32: only F32, BF16, F16"),
    "float8": (one([4], [0, 4], "F8_E4M3"), "'a' has dtype F8_E4M3"),
    "packed float4": (one([8], [0, 4], "F4"), "'a' has dtype F4"),
    "float64": (one([1], [0, 8], "F64", size=8), "'a' has dtype F64"),
    "a control character that the library quotes": (
        framed({"\x1b[2J": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
        "`?[2J`",
    ),
    "a control character in a name": (
        framed(b'{"\\u001b[2J\\n":' + GOOD.replace(b"F32", b"U32") + b"}", bytes(4)),
        r"'\x1b[2J\n' has dtype U32",
    ),
}


def error_line(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The error line of a command that opens the folder."""
    with pytest.raises(SystemExit) as stop:
        cli.main(lambda argv: len(TensorFiles.open(folder).kinds), None, ["command"])
    stderr = capsys.readouterr().err
    assert stop.value.code == 2 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert stderr[:-1].isprintable() and len(stderr) < 600, stderr
    return stderr


@pytest.mark.parametrize("case", FILES)
def test_invalid_file_is_reported_in_one_line(
    tmp_path: pathlib.Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = FILES[case]
    (tmp_path / FILE).write_bytes(content)
    signal.alarm(20)  # fails rather than hangs
    stderr = error_line(tmp_path, capsys)
    signal.alarm(0)
    assert message in stderr and str(tmp_path / FILE) in stderr


def test_truncated_file_is_never_accepted(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, ARRAYS)
    whole = (tmp_path / FILE).read_bytes()
    for length in range(0, len(whole), 7):
        (tmp_path / FILE).write_bytes(whole[:length])
        assert "truncated or invalid" in error_line(tmp_path, capsys)


def test_file_truncated_after_opening_is_an_os_error(tmp_path: pathlib.Path) -> None:
    write(tmp_path, ARRAYS)
    files = TensorFiles.open(tmp_path)
    os.truncate(tmp_path / FILE, (tmp_path / FILE).stat().st_size - 1)
    with pytest.raises(OSError, match=r"cannot read 'z'"):
        files.read("z")


def indexed(**weight_map: Any) -> Callable[[pathlib.Path], Any]:
    """An index with `a` in a.safetensors and `b` in b.safetensors, and the changes `weight_map`."""

    def make(folder: pathlib.Path) -> None:
        for name in "ab":
            save_file({name: np.zeros(1, np.float32)}, folder / f"{name}.safetensors")
        weights = {"a": "a.safetensors", "b": "b.safetensors", **weight_map}
        weights = {name: file for name, file in weights.items() if file is not None}
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 8}, "weight_map": weights}))

    return make


def index_text(text: str) -> Callable[[pathlib.Path], Any]:
    return lambda folder: (indexed()(folder), (folder / INDEX).write_text(text))


FOLDERS: dict[str, tuple[Callable[[pathlib.Path], Any], str]] = {
    "none": (lambda folder: folder.rmdir(), "is not a directory"),
    "a file": (lambda folder: (folder.rmdir(), folder.write_text("")), "is not a directory"),
    "an empty one": (lambda folder: None, f"has no {FILE} or {INDEX}"),
    "a pickle alone": (lambda folder: (folder / "pytorch_model.bin").touch(), "safe_serialization=True"),
    "another pickle": (lambda folder: (folder / "model.pt").touch(), "safe_serialization=True"),
    "a file that is a directory": (lambda folder: (folder / FILE).mkdir(), f"has no {FILE}"),
    "a file that is a pipe": (lambda folder: os.mkfifo(folder / FILE), f"has no {FILE}"),
    "a link to a device": (lambda folder: (folder / FILE).symlink_to("/dev/zero"), f"has no {FILE}"),
    "an index that is not JSON": (index_text("{"), "truncated or invalid"),
    "an index of deep brackets": (index_text("[" * 10**5), "truncated or invalid"),
    "an index that is a list": (index_text("[]"), "no weight_map"),
    "an index of nothing": (index_text('{"weight_map": {}}'), "no weight_map"),
    "an index without a map": (index_text('{"weight_map": ["a"]}'), "no weight_map"),
    "a name twice in the index": (
        index_text('{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}'),
        "duplicate key 'a'",
    ),
    "a file above": (
        indexed(b="../b.safetensors"),
        "'../b.safetensors', which is not a .safetensors file",
    ),
    "a file elsewhere": (
        indexed(b="/etc/b.safetensors"),
        "not a .safetensors file",
    ),
    "a file below": (indexed(b="x/b.safetensors"), "not a .safetensors file"),
    "a path of another system": (
        indexed(b="..\\b.safetensors"),
        "not a .safetensors file",
    ),
    "a file of another kind": (indexed(b="b.bin"), "not a .safetensors file"),
    "a file that is a number": (indexed(b=3), "not a .safetensors file"),
    "a file name with a null character": (
        indexed(b="\0.safetensors"),
        "not a .safetensors file",
    ),
    "a file name with a surrogate": (indexed(b="\ud800.safetensors"), "is missing"),
    "a file name that is too long": (indexed(b="b" * 300 + ".safetensors"), "is missing"),
    "a missing file": (indexed(b="c.safetensors"), "c.safetensors' is missing"),
    "a tensor that its file lacks": (indexed(c="b.safetensors"), f"has no tensor 'c', which {INDEX}"),
    "a surplus tensor": (
        lambda folder: (
            indexed()(folder),
            save_file({x: np.zeros(1, np.float32) for x in "bx"}, folder / "b.safetensors"),
        ),
        "b.safetensors has a tensor 'x'",
    ),
    "a tensor in two files": (
        lambda folder: (
            indexed()(folder),
            save_file({x: np.zeros(1, np.float32) for x in "ab"}, folder / "b.safetensors"),
        ),
        "b.safetensors has a tensor 'a'",
    ),
    "an index that claims tensors of another file": (
        indexed(b="a.safetensors"),
        "a.safetensors has no tensor 'b'",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folder_without_a_complete_model_is_reported_in_one_line(
    tmp_path: pathlib.Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make, message = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    assert message in error_line(folder, capsys)


def test_files_may_be_links_as_in_the_hubs_cache(tmp_path: pathlib.Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir(), folder.mkdir()
    indexed()(blobs)
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(pathlib.Path("..") / "blobs" / path.name)
    assert TensorFiles.open(folder).kinds.keys() == {"a", "b"}


def test_header_of_many_tensors_is_read_in_little_memory(tmp_path: pathlib.Path) -> None:
    count = 20_000
    header = {
        f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(count)
    }
    (tmp_path / FILE).write_bytes(framed(header, bytes(4 * count)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(TensorFiles.open(tmp_path).kinds) == count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
