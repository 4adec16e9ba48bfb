"""ArrayRecord files that get their name only once they are complete."""

from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from relora_jax.storage.atomic import publish, temporary_path


class RecordWriter:
    """Writes an ArrayRecord file; leaving the `with` without an error publishes it, an error removes it.

    Raises OSError if the disk fails, where the library raises RuntimeError.
    """

    def __init__(self, path: Path, options: str) -> None:
        self._path, self._temporary, self._records = path, temporary_path(path), 0
        try:
            self._writer = ArrayRecordWriter(str(self._temporary), options)
        except RuntimeError as error:
            raise self._os_error(error) from error

    def write(self, record: bytes) -> None:
        """Adds a record."""
        try:
            self._writer.write(record)  # pyright: ignore
        except RuntimeError as error:
            raise self._os_error(error) from error
        self._records += 1

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            self._writer.close()
            count = ArrayRecordReader(str(self._temporary)).num_records() if kind is None else 0
        except RuntimeError as error:
            self._temporary.unlink(missing_ok=True)
            raise self._os_error(error) from error
        if kind is not None:
            self._temporary.unlink(missing_ok=True)
        elif count != self._records:
            raise OSError(f"{self._temporary} holds {count} of {self._records} records: is the disk full?")
        else:
            publish(self._temporary, self._path)

    def _os_error(self, error: RuntimeError) -> OSError:
        return OSError(f"{self._path} cannot be written ({str(error).partition(';')[0]})")
