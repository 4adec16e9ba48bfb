"""Each format gives the documents that were written; what cannot be read is named with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relora_jax.data import file_source, formats, json_array, json_lines
from relora_jax.data.source import BadDocumentError
from relora_jax.errors import UserError
from tests.support.documents import texts

TEXTS = [*texts(9), "", 'é\n\n▁ \0 "end",\r\n', "\ufeff日本 😀"]
LARGEST_WINDOW = (31 - 10) << 3  # of a zstd frame, in its header: 2 GiB


def zstd(content, window=LARGEST_WINDOW):
    """Frames of uncompressed blocks, as `zstd --long=31` heads them."""
    blocks = [content[k : k + 1000] for k in range(0, len(content), 1000)] or [b""]
    head = b"\x28\xb5\x2f\xfd" + bytes([0, window])
    return b"".join(head + (1 | len(block) << 3).to_bytes(3, "little") + block for block in blocks)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def json_text(documents):
    return "".join(json.dumps({"url": "u", "text": t}, ensure_ascii=False) + "\n" for t in documents).encode()


def array(documents, **options):
    return json.dumps([{"url": "u", "text": t} for t in documents], **options).encode()


def csv_text(documents, **options):
    file = io.StringIO(newline="")
    csv.writer(file, **options).writerows([["url", "text"], *(["u", t] for t in documents)])
    return file.getvalue().encode()


CONTENTS = {
    "a.jsonl": json_text(TEXTS),
    "b.json": array(TEXTS, ensure_ascii=False, indent=1),
    "c.json": b"\xef\xbb\xbf \n" + array(TEXTS, separators=(",", ":")) + b"\r\n",
    "d.csv": csv_text(TEXTS),
    "e.csv": b"\xef\xbb\xbf" + csv_text(TEXTS, quoting=csv.QUOTE_ALL, lineterminator="\n\n"),
    "quoted.csv": b"\xef\xbb\xbf"
    + csv_text(TEXTS, quoting=csv.QUOTE_ALL).replace(b'"url",', b"").replace(b'"u",', b""),
    "mac.csv": csv_text(TEXTS, quoting=csv.QUOTE_ALL, lineterminator="\r"),
    "F.JSONL": json_text(TEXTS),
}


def find(path, field="text", **options):
    return file_source.find(str(path), field=field, validation_fraction=0.3, **options)


def read(path, field="text"):
    return [t for chunks in find(path, field).blocks(0) for chunk in chunks for t in chunk.texts]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", CONTENTS)
def test_every_format_yields_its_documents(tmp_path, name, ending):
    (tmp_path / f"{name}{ending}").write_bytes(COMPRESS[ending](CONTENTS[name]))
    assert read(tmp_path / "*") == TEXTS
    assert len(find(tmp_path / "*").stripes(3)) == (1 if ending else 3)


@pytest.mark.parametrize("ending", COMPRESS)
def test_text_file_is_one_document(tmp_path, ending):
    (tmp_path / f"a.txt{ending}").write_bytes(COMPRESS[ending](TEXTS[-2].encode()))
    assert read(tmp_path / "*") == [TEXTS[-2]] and find(tmp_path / "*").documents == 1


@pytest.mark.parametrize("ending", [ending for ending in COMPRESS if ending])
@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "d.csv", "g.txt"])
def test_cut_file_is_damaged_whatever_its_compression(tmp_path, name, ending):
    content = COMPRESS[ending](CONTENTS.get(name, json_text(TEXTS)) * (1 if name[1:] == ".json" else 40))
    (tmp_path / f"{name}{ending}").write_bytes(content[:-9])
    with pytest.raises(UserError, match=rf"{name}{ending} is damaged.* \(.+\): copy it again") as raised:
        read(tmp_path / "*")
    assert not isinstance(raised.value, BadDocumentError)
    (tmp_path / f"{name}{ending}").write_bytes(CONTENTS["a.jsonl"])  # not compressed at all
    with pytest.raises(UserError, match=rf"{name}{ending} is damaged \("):
        read(tmp_path / "*")


def test_damage_is_named_with_the_last_line_before_it(tmp_path):
    (tmp_path / "a.csv.zst").write_bytes(zstd(csv_text(texts(200)))[:-9])
    with pytest.raises(
        UserError, match=r"a\.csv\.zst is damaged after line [1-9]\d+ \(Compressed file ended"
    ):
        read(tmp_path / "*")


@pytest.mark.parametrize("name", ["a.jsonl", "b.json", "d.csv", "a.jsonl.bz2"])
def test_progress_reaches_the_size_of_the_file(tmp_path, name):
    content = {"j": json_text, "b": array, "d": csv_text}.get(name[0], json_text)(texts(1500))
    (tmp_path / name).write_bytes(bz2.compress(content) if name.endswith("bz2") else content)
    source = find(tmp_path / "*")
    sizes = [chunk.size for chunks in source.blocks(0) for chunk in chunks]
    assert sum(sizes) == pytest.approx(source.size, rel=0.05) and min(sizes) >= 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(
    items=st.lists(st.dictionaries(st.text(), JSON, max_size=3), max_size=5),
    step=st.integers(1, 9),
    indent=st.none() | st.integers(0, 2),
    ascii_only=st.booleans(),
)
def test_items_of_an_array_are_those_that_json_reads(items, step, indent, ascii_only):
    content = json.dumps(items, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_STEP", step)  # an item, or a character, may be cut anywhere
        numbered = list(json_array.items(io.BufferedReader(io.BytesIO(content))))  # pyright: ignore
    assert [number for number, _ in numbered] == list(range(1, len(items) + 1))
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    assert [json_lines.parse(source) for _, source in numbered] == items


FILES = {  # name, content -> part of the error message
    (
        "a.json",
        b'[{"text": "a"}, {"text": "b" "c"}]',
    ): "the array in {a.json} is not JSON (item 2: Expecting ','",
    (
        "a.json",
        b'[{"text": "a"} {"text": "b"}]',
    ): "not JSON (no comma or bracket after item 1): write it again",
    ("a.json", b'[{"text": "a"}'): "not JSON (item 1: it has no end)",
    ("a.json", b'[{"text": "a"}, {"te'): "not JSON (item 2: ",
    ("a.json", b'[{"text": "a"},]'): "not JSON (item 2: Expecting value",
    ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]'): "not the whole file (text follows its closing bracket)",
    ("a.json", b"[" * 100_000): "not JSON (item 1: ",
    ("a.json", b'[{"n": ' + b"1" * 5000 + b"}]"): "not JSON (item 1: Exceeds the limit",
    ("a.csv", b"id,content\n1,a\n"): "a.csv has no column 'text': set data.text_field to one of id, content",
    ("a.csv", "id,text\n1,a\n".encode("utf-16")): "a.csv is not UTF-8: convert the file",
    ("a.csv", b"text,text\na,b\n"): "a.csv has several columns 'text': rename all but one",
    ("a.csv", b"one long text that stands alone\n"): "set data.text_field to one of one long text that s...",
    ("a.csv", b'text,n\n"a",1\n\n"b,2\nc,3\n'): "is not CSV from line 4 on (unexpected end of data): quote",
    ("a.csv", b'text,n\n"a "b" c",1\n'): "is not CSV from line 2 on (',' expected after '\"')",
}


@pytest.mark.parametrize(
    ("file", "message"), FILES.items(), ids=[f"{n}-{s[:40]}" for (n, _), s in FILES.items()]
)
@pytest.mark.parametrize("skip", [False, True])
def test_file_that_cannot_be_read_on_is_an_error_even_if_documents_are_skipped(tmp_path, file, message, skip):
    (tmp_path / file[0]).write_bytes(file[1])
    with pytest.raises(UserError) as raised:
        list(find(tmp_path / "*", skip_bad_documents=skip).train_texts())
    assert message.replace("{a.json}", str(tmp_path / "a.json")) in str(raised.value)
    assert not isinstance(raised.value, BadDocumentError)


DOCUMENTS = {  # name, content with one bad document between two good ones -> part of the error message
    (
        "a.json",
        b'[{"text": "a"}, {"text": "caf\xe9 "}, {"text": "b"}]',
    ): "a.json, item 2 is not UTF-8 (invalid",
    ("a.json", b'[{"text": "a"}, {"text": null}, {"text": "b"}]'): "a.json, item 2: 'text' is null, not text",
    ("a.json", b'[{"text": "a"}, 123, {"text": "b"}]'): "a.json, item 2 is not a JSON object but int",
    ("a.json", b'[{"text": "a"}, {"text": "\\udce9"}, {"text": "b"}]'): "item 2 has half of a surrogate pair",
    (
        "a.csv",
        b"n,text\n1,a\n2,one, two\n3,b\n",
    ): "a.csv, line 3 has 3 fields, and the header 2: quote fields",
    ("a.csv", b'n,text\n1,"a"\n2\n3,b\n'): "a.csv, line 3 has 1 fields",
    (
        "a.csv",
        b'n,text\n"\n",a\n2,caf\xe9\n3,b\n',
    ): "a.csv, line 4 is not UTF-8 (unexpected end of data at byte 3)",
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\\udbff"}\n{"text": "b"}',
    ): "line 2 has half of a surrogate pair ('\\udbff'",
    (
        "a.jsonl",
        b'{"text": "a"}\n{"m": {"t": 1}, "u": 2}\n{"text": "b"}',
    ): "data.text_field to one of m.t, u, or skip",
}


@pytest.mark.parametrize(
    ("file", "message"), DOCUMENTS.items(), ids=[f"{n}-{s[:40]}" for (n, _), s in DOCUMENTS.items()]
)
def test_bad_document_is_named_with_its_place_or_skipped(tmp_path, file, message):
    (tmp_path / file[0]).write_bytes(file[1])
    with pytest.raises(BadDocumentError) as raised:
        read(tmp_path / "*")
    assert message in str(raised.value)
    [chunks] = (list(chunks) for chunks in find(tmp_path / "*", skip_bad_documents=True).blocks(0))
    [(good, _, skipped)] = chunks
    assert (good, skipped) == (["a", "b"], [raised.value.problem])


def test_field_may_be_inside_another(tmp_path):
    nested = [{"meta": {"text": t, "n": 1}} for t in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in nested))
    (tmp_path / "b.json").write_text(json.dumps(nested))
    pyarrow.parquet.write_table(pa.Table.from_pylist(nested), tmp_path / "c.parquet")
    pyarrow.parquet.write_table(pa.table({"meta.text": TEXTS}), tmp_path / "d.parquet")
    (tmp_path / "e.jsonl").write_text("".join(json.dumps({"meta.text": t, "meta": 0}) + "\n" for t in TEXTS))
    for name in ("a.jsonl", "b.json", "c.parquet", "d.parquet", "e.jsonl"):
        assert read(tmp_path / name, "meta.text") == TEXTS
    (tmp_path / "f.csv").write_bytes(csv_text(TEXTS).replace(b"text", b"meta.text", 1))
    assert read(tmp_path / "f.csv", "meta.text") == TEXTS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.jsonl", "line 1 has no field 'meta.txt': set data.text_field to one of meta.text, n"),
        ("a.parquet", "a.parquet has no column 'meta.txt': set data.text_field to one of meta.text, n"),
    ],
)
def test_missing_inner_field_lists_the_others(tmp_path, name, message):
    record = {"meta": {"text": "t"}, "n": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    pyarrow.parquet.write_table(pa.Table.from_pylist([record]), tmp_path / "a.parquet")
    with pytest.raises(UserError) as raised:
        read(tmp_path / name, "meta.txt")
    assert message in str(raised.value)


def test_column_that_a_parquet_file_has_twice_is_refused(tmp_path):
    table = pa.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet has several columns 'text'"):
        read(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pa.table({"text": [["a"]], "n": [1]}), tmp_path / "b.parquet")
    with pytest.raises(BadDocumentError, match=r"b\.parquet, row 1: 'text' is list, not text"):
        read(tmp_path / "b.parquet")


def test_overlong_item_is_rejected_without_reading_all_of_the_array(tmp_path, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 900)
    monkeypatch.setattr(json_array, "_STEP", 100)
    (tmp_path / "a.json").write_bytes(array(["x", "y" * 5000, *texts(999)]))
    with (tmp_path / "a.json").open("rb") as file:
        with pytest.raises(json_lines.Broken, match="item 2: "):
            list(json_array.items(file))
        assert file.tell() < 6000


@pytest.mark.slow
def test_memory_does_not_grow_with_the_array(tmp_path):
    import tracemalloc

    (tmp_path / "a.json").write_bytes(array(["x" * 1000] * 20_000))
    with (tmp_path / "a.json").open("rb") as file:
        tracemalloc.start()
        assert sum(len(source) for _, source in json_array.items(file)) > 2 * 10**7
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * 10**6


def test_every_known_name_and_no_other():
    names = ["a.txt", "a.TXT", "a.b.json", "a.csv.bz2", "a.jsonl.xz", "a.parquet"]
    unknown = [
        "a.md",
        "a.parquet.gz",
        ".txt",
        "txt",
        ".json.gz",
        "a.gz",
        "a.jsonl.zip",
        "a.json.gz.gz",
        "a.tsv",
    ]
    assert all(map(formats.is_known, names)) and not any(map(formats.is_known, unknown))
    assert formats.file_type("A.JSONL.GZ") == (".jsonl", ".gz")


def test_zstd_needs_no_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.txt.zst").write_bytes(zstd(b"text"))
    assert read(tmp_path / "*") == ["text"]
