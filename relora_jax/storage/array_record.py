"""ArrayRecord files that are whole under their names or not there at all."""

from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from relora_jax.storage.atomic import name_aside, publish


class RecordWriter:
    """An ArrayRecord file in the making; under its name where its `with` ends well, and otherwise gone.

    OSError where the disk does not take it: the library's own is a RuntimeError.
    """

    def __init__(self, path: Path, options: str) -> None:
        self._path, self._aside, self._records = path, name_aside(path), 0
        try:
            self._writer = ArrayRecordWriter(str(self._aside), options)
        except RuntimeError as error:
            raise self._unwritten(error) from error

    def write(self, record: bytes) -> None:
        """Adds a record."""
        try:
            self._writer.write(record)  # pyright: ignore
        except RuntimeError as error:
            raise self._unwritten(error) from error
        self._records += 1

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._writer.close()
            written = ArrayRecordReader(str(self._aside)).num_records() if kind is None else 0
        except RuntimeError as error:
            self._aside.unlink(missing_ok=True)
            raise self._unwritten(error) from error
        if kind is not None:
            self._aside.unlink(missing_ok=True)
        elif written != self._records:
            raise OSError(f"{self._aside} holds {written} of {self._records} records: is the disk full?")
        else:
            publish(self._aside, self._path)

    def _unwritten(self, error: RuntimeError) -> OSError:
        return OSError(f"{self._path} cannot be written ({str(error).partition(';')[0]})")
