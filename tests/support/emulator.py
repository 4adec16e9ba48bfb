"""An object store on this machine: gcp-storage-emulator as a process, with its objects in a folder.

python -m tests.support.emulator FOLDER PORT
"""

import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from http import HTTPStatus
from importlib.util import find_spec
from typing import Any

import pytest

BUCKET = "bucket"
MISSING = [name for name in ("gcsfs", "gcp_storage_emulator") if find_spec(name) is None]
START_S = 60


class Emulator:
    """Starts in the `with`, can be stopped and started again, and keeps its objects."""

    def __init__(self, folder: pathlib.Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self._process = folder, None
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it asks Google for the kind of the bucket
        }

    def start(self) -> None:
        """Returns once it answers."""
        command = [sys.executable, "-m", "tests.support.emulator", str(self.folder), str(self.port)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise TimeoutError("the emulator does not answer")

    def stop(self) -> None:
        """Kills it; its objects stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> "Emulator":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """A running emulator, which this process and its children use as Google's store."""
    if MISSING:
        pytest.skip(f"{' and '.join(MISSING)} are not installed: pip install -e '.[store-test]'")
    with pytest.MonkeyPatch.context() as patch, Emulator(tmp_path_factory.mktemp("store")) as started:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


def serve(folder: str, port: int) -> None:
    """Serves until it is killed, with the generations that the emulator leaves out."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def generation(storage: Any, bucket: str, name: str) -> str:
        try:
            return storage.get_file_obj(bucket, name)["generation"]
        except NotFound:
            return "0"

    download, insert = objects.download, objects.insert

    def download_with_generation(request: Any, response: Any, storage: Any, *args: Any) -> None:
        download(request, response, storage, *args)
        path = request.params["bucket_name"], request.params["object_id"]
        response["x-goog-generation"] = generation(storage, *path)

    def insert_if_generation_matches(request: Any, response: Any, storage: Any, *args: Any) -> None:
        expected, content = request.query.get("ifGenerationMatch"), request.data
        names = request.query.get("name") or [content["meta"]["name"]]  # of an upload in parts
        if expected and generation(storage, request.params["bucket_name"], names[0]) != expected[0]:
            response.status = HTTPStatus.PRECONDITION_FAILED
        else:
            insert(request, response, storage, *args)

    objects.download = download_with_generation
    for _, handlers in server.HANDLERS:
        for method, handler in handlers.items():
            new = {download: download_with_generation, insert: insert_if_generation_matches}
            handlers[method] = new.get(handler, handler)
    server.create_server("127.0.0.1", port, False, BUCKET, data_dir=folder).run()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
