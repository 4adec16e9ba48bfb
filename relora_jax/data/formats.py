"""The documents of one file: JSON lines, a JSON array, CSV, Parquet, or plain text.

.jsonl and .json (one object per line, or in .json one array of objects) and .csv (with a header) have the
text in a field, .parquet in a column; .txt is one document. All but .parquet may be compressed.
"""

import csv
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from relora_jax.data import compression, json_array, json_lines
from relora_jax.data.compression import Damaged
from relora_jax.data.source import CHUNK_DOCUMENTS, BadDocumentError
from relora_jax.errors import UserError

Document = Callable[[], str]  # decodes the text, or raises BadDocumentError
_Documents = Iterator[tuple[str, Document]]  # with its place in the file: "line 3"
_MISSING = object()
MAX_NAMES = 20  # in messages: of fields, and characters of a name


def documents(file: Any, raw: io.BufferedReader, field: str) -> Iterator[Document]:
    """The documents in `raw`, the open `file`; those that are skipped are not decoded.

    UserError if the file cannot be read on.
    """
    kind, ending = file_type(file.name)
    last = ""
    try:
        for last, document in _READERS[kind](file, compression.opened(raw, ending), field):  # noqa: B007
            yield document
    except Damaged as error:
        after = f" after {last}" if last else ""
        raise UserError(f"{file} is damaged{after} ({error}): copy it again") from error


def file_type(name: str) -> tuple[str, str]:
    """The endings of a file's format and its compression, (".jsonl", ".gz"); empty if there is none."""
    name, compressed = name.lower(), ""
    for ending in compression.ENDINGS:
        if name.endswith(ending):
            name, compressed = name.removesuffix(ending), ending
    stem, dot, kind = name.rpartition(".")
    return (dot + kind if stem else ""), compressed


def is_known(name: str) -> bool:
    """Whether files of that name can be read."""
    kind, compressed = file_type(name)
    return kind in _READERS and not (kind == ".parquet" and compressed)


def check(file: Any, setting: str) -> None:
    """UserError if the file's type is unsupported, or needs a package that is missing."""
    if not is_known(file.name):
        raise UserError(f"{file} of {setting} has an unsupported file type: use {KNOWN}")
    kind, compressed = file_type(file.name)
    if kind == ".parquet":
        _arrow()
    if compressed == ".zst":
        compression.zstd_module()


def _json_lines(file: Any, stream: io.BufferedReader, field: str) -> _Documents:
    for number, line in json_lines.lines(stream):
        yield f"line {number}", partial(_json_text, f"{file}, line {number}", line, field)


def _json(file: Any, stream: io.BufferedReader, field: str) -> _Documents:
    if not json_array.is_array(stream):
        yield from _json_lines(file, stream, field)
        return
    try:
        for number, item in json_array.items(stream):
            yield f"item {number}", partial(_json_text, f"{file}, item {number}", item, field)
    except json_lines.Broken as error:
        raise UserError(f"the array in {file} is {error}: write it again") from error


def _json_text(location: str, source: bytes, field: str) -> str:
    try:
        record = json_lines.parse(source)
    except json_lines.Broken as error:
        remedy = "each line must be one JSON object in UTF-8, or the file one array of them"
        raise BadDocumentError(f"{location} is {error}", remedy) from error
    return _text(location, record, field)


def _csv(file: Any, stream: io.BufferedReader, field: str) -> _Documents:
    csv.field_size_limit(json_lines.LONGEST_LINE)
    # no byte-order mark; lines may end with "\r"; bytes that are not UTF-8 stay, in surrogates, until their
    # document is decoded
    text = io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(iter(lambda: text.readline(json_lines.LONGEST_LINE), ""), strict=True)
    header, index, first = list[str](), 0, 1
    try:
        for row in reader:
            where, first = f"line {first}", reader.line_num + 1
            if row and header:
                yield where, partial(_cell, f"{file}, {where}", row, index, len(header))
            elif row:  # not an empty line
                header = row
                "".join(header).encode()
                index = _index(file, header, field)
    except UnicodeEncodeError as error:
        raise UserError(f"the header of {file} is not UTF-8: convert the file") from error
    except csv.Error as error:
        remedy = "quote fields that hold commas, quotes or line ends, and double the quotes inside"
        raise UserError(f"{file} is not CSV from line {first} on ({error}): {remedy}") from error
    finally:
        if not stream.closed:
            text.detach()  # leaves the file open, as other formats do


def _index(file: Any, columns: list[str], field: str) -> int:
    """The place of column `field`; UserError if there is none, or more than one."""
    if columns.count(field) > 1:
        raise UserError(f"{file} has several columns {field!r}: rename all but one")
    if field not in columns:
        raise UserError(f"{file} has no column {field!r}: set data.text_field to one of {_names(columns)}")
    return columns.index(field)


def _cell(location: str, row: list[str], index: int, columns: int) -> str:
    if len(row) != columns:
        problem = f"{location} has {len(row)} fields, and the header {columns}"
        raise BadDocumentError(problem, "quote fields that hold commas")
    return _from_csv(location, row[index])


def _from_csv(location: str, text: str) -> str:
    return _utf8(location, text.encode("utf-8", "surrogateescape"))


def _whole(file: Any, stream: io.BufferedReader, field: str) -> _Documents:
    content = stream.read()
    yield "its text", lambda: _utf8(str(file), content.removeprefix(json_lines.BOM))


def _parquet(file: Any, raw: io.BufferedReader, field: str) -> _Documents:
    arrow = _arrow()
    failures = (arrow.ArrowException, OSError)
    try:
        table = arrow.parquet.ParquetFile(raw)
        names = table.schema_arrow.names
        paths = [table.schema.column(i).path for i in range(len(table.schema))]
        if (count := paths.count(field)) != 1:  # a list has another path than its name
            _index(file, paths if count or field not in names else names, field)
        batches, number = table.iter_batches(batch_size=CHUNK_DOCUMENTS, columns=[field]), 0
        while (batch := next(batches, None)) is not None:
            [column] = batch.schema.names
            for value in batch.column(0):
                number += 1
                yield f"row {number}", partial(_parquet_text, f"{file}, row {number}", column, value, field)
    except failures as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise UserError(f"{file} cannot be read as Parquet ({error}): copy it again") from error


def _parquet_text(location: str, column: str, value: Any, field: str) -> str:
    try:
        record = {column: value.as_py()}
    except UnicodeDecodeError as error:
        raise _not_utf8(location, error) from error
    return _text(location, record, field)


def _arrow() -> Any:
    """The package pyarrow, which reads Parquet."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("a .parquet file requires pyarrow: pip install 'relora-jax[arrow]'") from None
    return pyarrow


def _text(location: str, record: dict[str, Any], field: str) -> str:
    """The text in a field of a record, or with `outer.inner` in one of an object in a field."""
    value: Any = record.get(field, _MISSING)
    if value is _MISSING:
        value = record
        for name in field.split("."):
            value = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
    if value is _MISSING:
        remedy = f"set data.text_field to one of {_names(list(_fields(record)))}"
        raise BadDocumentError(f"{location} has no field {field!r}", remedy)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise BadDocumentError(f"{location}: {field!r} is {kind}, not text", "set data.text_field")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"{value[error.start]!r} at character {error.start}"
        raise BadDocumentError(f"{location} has half of a surrogate pair ({half})", "remove it") from error
    return value


def _fields(record: dict[str, Any]) -> Iterator[str]:
    """The names of a record's fields, with those of the objects in it as `outer.inner`."""
    for name, value in record.items():
        yield from (f"{name}.{inner}" for inner in _fields(value)) if isinstance(value, dict) else [name]


def _names(names: list[str]) -> str:
    """A list of names of fields for a message; whole texts stand where a header is missing."""
    listed = [name if len(name) <= MAX_NAMES else f"{name[:MAX_NAMES]}..." for name in names[:MAX_NAMES]]
    return ", ".join(listed + ["..."] * (len(names) > MAX_NAMES)) or "none"


def _utf8(location: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _not_utf8(location, error) from error


def _not_utf8(location: str, error: UnicodeDecodeError) -> BadDocumentError:
    return BadDocumentError(f"{location} is not UTF-8 ({error.reason} at byte {error.start})", "convert it")


_READERS: dict[str, Callable[[Any, io.BufferedReader, str], _Documents]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".txt": _whole,
    ".csv": _csv,
    ".parquet": _parquet,
}
KNOWN = f"{', '.join(_READERS)} (all but .parquet also with {', '.join(compression.ENDINGS)})"
