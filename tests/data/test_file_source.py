import contextlib
import dataclasses
import errno
import gzip
import hashlib
import io
import itertools
import json
import pathlib
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest

from relora_jax.data import compression, file_source, json_lines
from tests.support.documents import texts

TEXTS = [*texts(9), "", "é\n\n▁ \0 end\n"]


def lines(documents, field="text"):
    return b"".join(json.dumps({"url": "u", field: t}).encode() + b"\n" for t in documents)


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def parquet(path, documents, field="text"):
    table = pa.table({"url": ["u"] * len(documents), field: documents})
    pyarrow.parquet.write_table(table, path, row_group_size=4)


def find(pattern, *, field="text", validation_fraction=0.3, block_documents=4):
    source = file_source.find(str(pattern), field=field, validation_fraction=validation_fraction)
    return dataclasses.replace(source, block_documents=block_documents)


def read(source, file=0):
    with contextlib.closing(source.blocks(file)) as blocks:
        return [[text for chunk in chunks for text in chunk.texts] for chunks in blocks]


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", lambda path: path.write_bytes(lines(TEXTS))),
        ("a.json", lambda path: path.write_bytes(lines(TEXTS)[:-1])),  # no final line end
        ("a.jsonl.gz", lambda path: path.write_bytes(gzip.compress(lines(TEXTS)))),
        ("a.json.gz", lambda path: path.write_bytes(b"".join(gzip.compress(lines([t])) for t in TEXTS))),
        ("a.jsonl.zst", lambda path: path.write_bytes(zstd(lines(TEXTS)))),
        ("a.json.zst", lambda path: path.write_bytes(b"".join(zstd(lines([t])) for t in TEXTS))),
        ("a.parquet", lambda path: parquet(path, TEXTS)),
        (
            "b.jsonl",
            lambda path: path.write_bytes(b"\xef\xbb\xbf\n" + lines(TEXTS).replace(b"\n", b"\r\n\n")),
        ),
    ],
)
def test_every_file_type_yields_its_documents_in_order_in_blocks(tmp_path, name, write):
    write(tmp_path / name)
    assert read(find(tmp_path / "*")) == [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
    write(tmp_path / f"b{name}")
    assert read(find(tmp_path / "*", block_documents=11), file=1) == [TEXTS]  # no empty block at the end


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_file_is_one_document(tmp_path, name):
    content = TEXTS[-1].encode()
    compressed = {".gz": gzip.compress, ".zst": zstd}.get(name[5:], bytes)(content)
    (tmp_path / name).write_bytes(compressed)
    assert read(find(tmp_path / "*")) == [[TEXTS[-1]]]


def test_files_are_read_in_the_order_of_their_paths(tmp_path, monkeypatch):
    for name in ("b/1.txt", "a/2.txt", "a/1.txt", "a/c/3.txt", "0.txt", "a/c/x.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    source = find(tmp_path / "**/*.txt")
    ordered = ["0.txt", "a/1.txt", "a/2.txt", "a/c/3.txt", "b/1.txt"]
    assert [read(source, k) for k in range(5)] == [[[name]] for name in ordered]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/a/*.txt").paths == (tmp_path / "a/1.txt", tmp_path / "a/2.txt")
    assert (source.files, source.bytes) == (5, sum(map(len, ordered)))


def test_block_that_is_not_consumed_is_not_decoded(tmp_path):
    content = lines(TEXTS[:4]) + b"no json\n" + lines(TEXTS[:3]) + lines(TEXTS[4:6])
    (tmp_path / "a.jsonl").write_bytes(content)
    first, second, third = (
        block if n == 1 else [t for chunk in block for t in chunk.texts]
        for n, block in enumerate(find(tmp_path / "*").blocks(0))
    )
    assert first == TEXTS[:4] and third == TEXTS[4:6] and second not in (first, third)
    (tmp_path / "b.jsonl").write_bytes(lines(TEXTS))
    half = [next(chunks).texts for chunks in find(tmp_path / "b*", block_documents=200).blocks(0)]
    assert half == [TEXTS]


def test_sizes_of_the_chunks_sum_to_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(texts(1500)))
    source = find(tmp_path / "*", block_documents=400)
    sizes = [chunk.size for chunks in source.blocks(0) for chunk in chunks]
    assert sum(sizes) == pytest.approx(source.size, rel=0.05) and min(sizes) >= 0


def test_document_is_held_out_only_by_the_hash_of_its_text(tmp_path):
    documents = texts(400)
    (tmp_path / "a.jsonl").write_bytes(lines(documents))
    source = find(tmp_path / "a*")
    held = [hashlib.sha256(t.encode()).hexdigest() < f"{int(0.3 * 16**16):016x}" for t in documents]
    assert [bool(source.part(t)) for t in documents] == held and 80 < sum(held) < 160
    assert list(source.train_texts()) == [t for t, out in zip(documents, held, strict=True) if not out]
    for fraction, count in ((0.0, 400), (1.0, 0)):
        alone = find(tmp_path / "a*", validation_fraction=fraction)
        assert sum(not alone.part(t) for t in documents) == count


def test_fingerprint_depends_on_the_text_and_not_on_its_folder(tmp_path):
    big = lines(texts(600))
    assert len(big) > 150_000

    def mark(folder, **contents):
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / f"{name}.jsonl").write_bytes(content)
        return find(tmp_path / folder / "*").fingerprint()

    first = mark("one", a=big, b=b"{}")
    assert mark("two", a=big, b=b"{}") == first
    others = {
        mark("3", a=big, b=b"{ }"),
        mark("4", a=big),
        mark("5", a=big, c=b"{}"),
        mark("6", a=b"\n" + big[1:], b=b"{}"),
        mark("7", a=big[:-2] + b" \n", b=b"{}"),
        mark("8", a=b"{}", b=big),
    }
    assert len(others | {first}) == 7


def test_workers_share_uncompressed_files_if_they_outnumber_files(tmp_path):
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.json.zst"):
        (tmp_path / name).write_text("t")
    for workers, step in ((1, 1), (4, 1), (5, 2), (9, 3)):
        stripes = find(tmp_path / "*").stripes(workers)
        blocks = [(s.file, n) for s in stripes for n in range(7) if n in s]
        assert len(blocks) == 28 and sorted(blocks) == list(itertools.product(range(4), range(7)))
        assert [sum(s.file == file for s in stripes) for file in range(4)] == [step, 1, step, 1]


DAMAGED = {  # name, content -> part of the error message
    (
        "a.jsonl",
        lines(["x"]) + b'{"text": "caf\xe9"}\n',
    ): "a.jsonl, line 2 is not UTF-8 (invalid continuation",
    (
        "a.jsonl",
        lines(["x"]) + b'{"text": "\\ud800"}\n',
    ): "a.jsonl, line 2 has half of a surrogate pair ('\\ud800' at",
    ("a.jsonl", lines(["x", "y"]) + b'\n{"text": \n'): "a.jsonl, line 4 is not JSON (Expecting value",
    ("a.jsonl", b"[" * 100_000 + b"\n"): "a.jsonl, line 1 is not JSON (",
    ("a.jsonl", b'{"n": ' + b"1" * 5000 + b"}\n"): "line 1 is not JSON (Exceeds the limit",
    ("a.jsonl", b'["text"]\n'): "a.jsonl, line 1 is not a JSON object but list",
    ("a.jsonl", lines(["x"]) + lines(["x"], "content")): "line 2 has no field 'text': set data.text_field to",
    ("a.jsonl", b'{"text": 3}\n'): "a.jsonl, line 1: 'text' is int, not text",
    ("a.jsonl", b'{"text": null}\n'): "a.jsonl, line 1: 'text' is null, not text",
    ("a.jsonl.gz", gzip.compress(lines(texts(200)))[:-900]): "a.jsonl.gz is damaged after line 1",
    ("a.jsonl.gz", lines(texts(3))): "a.jsonl.gz is damaged (Not a gzipped file",
    ("a.jsonl.zst", zstd(lines(texts(200)))[:-900]): "a.jsonl.zst is damaged (",
    ("a.jsonl.zst", lines(texts(3))): "a.jsonl.zst is damaged (Unable to decompress",
    ("a.txt", b"caf\xe9"): "a.txt is not UTF-8 (unexpected end of data at byte 3)",
    ("a.txt.gz", gzip.compress(lines(texts(200)))[:-900]): "a.txt.gz is damaged (Compressed file ended",
    ("a.txt.zst", zstd(lines(texts(200)))[:-900]): "a.txt.zst is damaged (",
    ("a.parquet", b"PAR1 and no more"): "a.parquet cannot be read as Parquet (",
    ("a.md", b"text"): "a.md of data.text",
    (
        "a.parquet.gz",
        b"text",
    ): "has an unsupported file type: use .jsonl, .json, .txt, .csv, .parquet (all but",
}


@pytest.mark.parametrize(
    ("file", "message"), DAMAGED.items(), ids=[f"{n}-{s[:40]}" for (n, _), s in DAMAGED.items()]
)
def test_damage_is_reported_in_one_line_with_file_and_line(tmp_path, file, message):
    (tmp_path / file[0]).write_bytes(file[1])
    with pytest.raises(ValueError) as raised:
        read(find(tmp_path / "*"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_overlong_line_is_rejected_without_reading_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 900)
    fits = lines(["x"])[:-2] + b" " * 850 + b"}\n"
    (tmp_path / "a.jsonl").write_bytes(fits + lines(["x" * 2000]) + lines(["y"]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is longer than 900 bytes: each line must be one"):
        read(find(tmp_path / "*"))
    with (tmp_path / "a.jsonl").open("rb") as file:
        numbered = [(number, len(line)) for number, line in json_lines.lines(file)]
    assert numbered == [(1, len(fits)), (2, 900), (3, len(lines(["y"])))]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"])
def test_disk_failure_is_not_reported_as_damage(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(b"")

    class Failing(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, _):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pathlib.Path, "open", lambda *_: io.BufferedReader(Failing()))
    with pytest.raises(OSError, match="Input/output error"):
        read(find(tmp_path / "*"))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        (
            "content",
            ["a"],
            "a.parquet has no column 'text': set data.text_field to one of url, content",
        ),
        ("text", [1], "a.parquet, row 1: 'text' is int, not text"),
        ("text", ["a"] * 5 + [None], "a.parquet, row 6: 'text' is null, not text"),
        ("text", pa.array([b"a", b"caf\xe9"]).view(pa.string()), "a.parquet, row 2 is not UTF-8"),
    ],
)
def test_bad_column_is_reported_with_its_row(tmp_path, column, values, message):
    parquet(tmp_path / "a.parquet", values, column)
    with pytest.raises(ValueError) as raised:
        read(find(tmp_path / "*"))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_damaged_parquet_file_is_named(tmp_path):
    parquet(tmp_path / "a.parquet", texts(3000))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 2000] = b"\xff" * 2000
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
        read(find(tmp_path / "*"))


def test_pattern_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"data\.text '.*/\*\.txt' matches only directories: add /\*\*"):
        find(tmp_path / "*.txt")
    with pytest.raises(ValueError, match=r"data\.text '.*/\*\.csv' matches no file .*quote the pattern"):
        find(tmp_path / "*.csv")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("a.parquet", "pyarrow.parquet", "pyarrow"), ("a.txt.zst", compression.ZSTD, compression.ZSTD)],
)
def test_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch, name, module, package):
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"requires {package}: pip install 'relora-jax\[arrow\]'"):
        find(tmp_path / "*")
