import gzip
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from relora_jax import cli
from relora_jax.data import c4, json_lines, tfds_source, workers
from relora_jax.storage import array_record
from scripts import c4_from_json
from tests.support.documents import texts

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path


def line(text, **more):
    return (
        json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "http://x.org", **more}) + "\n"
    )


def write(folder, documents, *, files=3):
    """`files` train files of the documents in turn, one validation file, named as C4 names them."""
    folder.mkdir(exist_ok=True)
    size = -(-len(documents) // files)
    for k in range(files):
        part = "".join(map(line, documents[k * size : (k + 1) * size]))
        (folder / f"c4-train.{k:05d}-of-{files:05d}.json.gz").write_bytes(gzip.compress(part.encode()))
    (folder / "c4-validation.00000-of-00001.json.gz").write_bytes(gzip.compress(line("held out").encode()))
    return str(folder / "c4-*.json.gz")


def build(pattern, *, processes=1, skip_broken=False, version="3.1.0"):
    return c4.build(c4.find(pattern), version=version, processes=processes, skip_broken=skip_broken)


def dataset(folders):
    return folders / "tfds/c4/en/3.1.0"


@pytest.mark.parametrize("processes", [1, 2])
def test_documents_come_in_the_order_of_files_and_lines(folders, processes):
    documents = [*texts(20), "", "é \0 \u2581\n\n", "x" * 200_000]
    path, shards = build(write(folders / "validation", documents), processes=processes)
    assert path == dataset(folders)
    assert list(tfds_source.open_dataset("c4/en", "train")) == documents
    assert list(tfds_source.open_dataset("c4/en:3.1.0", "validation")) == ["held out"]
    assert [(shard.documents, shard.broken) for shard in shards] == [(8, 0), (8, 0), (7, 0), (1, 0)]
    assert {file.name.partition(".")[0] for file in path.iterdir()} == {
        "c4-train",
        "c4-validation",
        "dataset_info",
        "features",
    }


def test_tfds_itself_opens_it_with_timestamp_and_url(folders):
    import tensorflow_datasets as tfds

    folder = folders / "in"
    folder.mkdir()
    (folder / "a.json").write_text(line("one", url="u1") + json.dumps({"text": "two", "other": [1]}))
    build(str(folder / "*"))
    source = tfds.data_source("c4/en", split="train", data_dir=folders / "tfds")
    assert [dict(e) for e in source] == [
        {"text": b"one", "timestamp": b"2019-04-25T12:57:54Z", "url": b"u1"},
        {"text": b"two", "timestamp": b"", "url": b""},
    ]
    sizes = tfds.builder_from_directory(dataset(folders)).info.splits
    (file,) = dataset(folders).glob("c4-train*")
    examples = array_record.ArrayRecordReader(str(file)).read_all()
    assert list(sizes) == ["train"] and sizes["train"].num_bytes == sum(map(len, examples))


BROKEN = {
    b"{": "(Expecting property name enclosed in double quotes at column 2)",
    b"[]": "no JSON object",
    b'"text"': "no JSON object",
    b'{"txt": "x"}': "it has no `text`",
    b'{"text": 3}': "its `text` is not a text",
    b'{"text": "x", "url": 3}': "its `url` is not a text",
    b'{"text": "caf\xe9"}': "(not UTF-8 (invalid continuation byte at byte 13))",
    b'{"text": "\\ud800"}': "surrogates not allowed",
    b"[" * 100_000: "recursion",
    b'{"text": "x", "n": ' + b"1" * 5000 + b"}": "(no JSON (Exceeds the limit (4300 digits)",
    b'{"text": "' + b"x" * 1000 + b'"}': "longer than 900 bytes",
}


@pytest.mark.parametrize("content", BROKEN)
def test_broken_line_is_named_and_stops_the_job_or_is_left_out(folders, content, monkeypatch):
    monkeypatch.setattr(json_lines, "LONGEST_LINE", 900 if b"xxx" in content else 2**26)
    folder = folders / "in"
    folder.mkdir()
    (folder / "a.json").write_bytes(line("one").encode() + b"\n" + content + b"\n" + line("two").encode())
    with pytest.raises(ValueError, match=r"/a\.json:3 is broken \(.*--skip_broken$") as raised:
        build(str(folder / "*"))
    assert BROKEN[content] in str(raised.value) and "\n" not in str(raised.value)
    assert not dataset(folders).exists()
    _, (shard,) = build(str(folder / "*"), skip_broken=True)
    assert (shard.documents, shard.broken) == (2, 1) and "/a.json:3 is broken" in shard.named[0]
    assert list(tfds_source.open_dataset("c4/en", "train")) == ["one", "two"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "garbled", "no gzip"])
def test_damaged_file_is_named_and_what_precedes_the_damage_is_kept(folders, damage):
    pattern = write(folders / "in", texts(1000), files=2)
    file = folders / "in/c4-train.00001-of-00002.json.gz"
    content = file.read_bytes()
    middle = len(content) // 2
    changed = {
        "cut": content[:middle],
        "flipped": content[:middle] + bytes(99) + content[middle + 99 :],
        "garbled": content[:10] + b"\xff" * 9 + content[19:],
        "no gzip": b"plain",
    }
    file.write_bytes(changed[damage])
    with pytest.raises(ValueError, match=r"/c4-train\.00001-of-00002\.json\.gz:\d+ is broken") as raised:
        build(pattern)
    assert "\n" not in str(raised.value)
    _, shards = build(pattern, skip_broken=True)
    assert shards[1].broken >= 1 and shards[0].documents == 500
    read = list(tfds_source.open_dataset("c4/en", "train"))
    assert read[:500] == texts(1000)[:500] and len(read) == 500 + shards[1].documents
    if damage == "cut":
        assert f":{shards[1].documents + 1} is broken (the file ends" in shards[1].named[0]
        assert 0 < shards[1].documents < 500 and read == texts(1000)[: len(read)]


def test_places_of_many_broken_lines_are_counted_and_the_first_named(folders):
    folder = folders / "in"
    folder.mkdir()
    (folder / "a.json").write_text(line("one") + "{\n" * 5000)
    _, (shard,) = build(str(folder / "*"), skip_broken=True)
    assert shard.broken == 5000
    assert [place.split(" ")[0].rpartition(":")[2] for place in shard.named] == ["2", "3", "4"]


def test_what_was_skipped_stops_a_command_that_does_not_skip(folders, monkeypatch):
    folder = folders / "in"
    folder.mkdir()
    (folder / "a.json").write_text(line("one") + "{\n")
    with monkeypatch.context() as patch:
        patch.setattr(c4, "_write_metadata", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(str(folder / "*"), skip_broken=True)
    with pytest.raises(ValueError, match=r"a\.json:2 is broken .*--skip_broken"):
        build(str(folder / "*"))


def test_killed_job_goes_on_with_the_files_that_are_left(folders):
    documents = [f"{i} {'word ' * 400}" for i in range(6000)]
    pattern = write(folders / "in", documents, files=6)
    command = [sys.executable, "scripts/c4_from_json.py", f"--input={pattern}", "--workers=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    partial = folders / "tfds/c4/en/3.1.0.partial"
    finished = lambda: [file for file in partial.glob("finished/*") if not file.suffix]  # noqa: E731
    while not finished():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not dataset(folders).exists()
    time.sleep(0.5)  # its workers end
    before = {file.stat().st_ino for file in finished()}
    assert 0 < len(before) < 7
    (partial / "finished/0123.1.new").touch()  # as one that was killed leaves it
    time.sleep(0.5)
    assert {file.stat().st_ino for file in finished()} == before
    command[-1] = "--workers=1"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == f"6,001 documents of 7 files in {dataset(folders)}\n"
    assert list(tfds_source.open_dataset("c4/en", "train")) == documents
    assert not partial.exists() and not list(dataset(folders).rglob("*.new"))
    assert before < {file.stat().st_ino for file in dataset(folders).iterdir()}


def test_command_takes_each_cpu_where_the_system_does_not_tell_whose_they_are(folders, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)  # as on macOS
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    asked = []
    monkeypatch.setattr(c4, "build", lambda files, **told: asked.append(told["processes"]) or (folders, []))
    assert c4_from_json.main(["c4_from_json", f"--input={write(folders / 'in', texts(3))}"]) == 0
    assert asked == [7] == [workers.cpus()]


def test_finished_dataset_is_never_written_again(folders):
    pattern = write(folders / "in", texts(6))
    build(pattern)
    before = {file.name: file.stat().st_mtime_ns for file in dataset(folders).iterdir()}
    with pytest.raises(ValueError, match=r"c4/en/3\.1\.0 is there already: remove it, or give another"):
        build(pattern)
    assert {file.name: file.stat().st_mtime_ns for file in dataset(folders).iterdir()} == before
    build(pattern, version="3.1.1")
    assert tfds_source.dataset_version("c4/en") == "c4/en:3.1.1"


def spied(monkeypatch):
    """The names of the files that are read from now on."""
    read, convert = [], c4._convert
    spy = lambda skip, task: read.append(task[0].name) or convert(skip, task)  # noqa: E731
    monkeypatch.setattr(c4, "_convert", spy)
    return read


def numbered(folder, documents):
    """A file for each document."""
    folder.mkdir(exist_ok=True)
    for k, document in enumerate(documents):
        (folder / f"{k}.json").write_text(line(document))
    return str(folder / "*.json")


@pytest.mark.parametrize("mended", ["at the same size", "removed", "left out", "and another is new"])
def test_what_was_mended_is_read_anew_and_nothing_else(folders, monkeypatch, mended):
    pattern = numbered(folders / "in", texts(6))
    bad = folders / "in/3.json"
    good = bad.read_text()
    bad.write_text(good.replace("{", "[", 1))
    with pytest.raises(ValueError, match=r"/3\.json:1 is broken"):
        build(pattern)
    left = texts(6)
    if mended == "removed":
        bad.unlink()
    elif mended != "left out":
        bad.write_text(good)
    if mended == "and another is new":
        (folders / "in/1a.json").write_text(line("new"))
        left.insert(2, "new")
    read = spied(monkeypatch)
    _, shards = build(pattern, skip_broken=mended == "left out")
    anew = {"removed": [], "and another is new": ["1a.json", "3.json"]}.get(mended, ["3.json"])
    assert read == [*anew, "4.json", "5.json"]
    if mended in ("removed", "left out"):
        del left[3]
    assert list(tfds_source.open_dataset("c4/en", "train")) == left
    assert sum(shard.broken for shard in shards) == (mended == "left out")
    assert not (dataset(folders) / "finished").exists()


def test_line_that_was_skipped_and_then_mended_at_the_same_size_is_read(folders, monkeypatch):
    pattern = numbered(folders / "in", texts(3))
    bad = folders / "in/1.json"
    good = bad.read_text()
    bad.write_text(good.replace("{", "[", 1))
    with monkeypatch.context() as patch:
        patch.setattr(c4, "_write_metadata", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build(pattern, skip_broken=True)
    bad.write_text(good)
    read = spied(monkeypatch)
    build(pattern)
    assert read == ["1.json"] and list(tfds_source.open_dataset("c4/en", "train")) == texts(3)


def test_kill_between_the_last_names_mixes_no_files(folders, monkeypatch):
    pattern = numbered(folders / "in", texts(5))
    rename = pathlib.Path.rename

    def dying(self, target):
        if target.name.startswith("c4-train.array_record-00003"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            build(pattern)
    (folders / "in/1.json").unlink()
    read = spied(monkeypatch)
    build(pattern)
    assert read == [] and list(tfds_source.open_dataset("c4/en", "train")) == [
        texts(5)[k] for k in (0, 2, 3, 4)
    ]
    assert len(list(dataset(folders).iterdir())) == 4 + 2


def test_shard_that_did_not_reach_the_disk_is_an_error_and_has_no_name(folders, monkeypatch):
    class Deaf(array_record.ArrayRecordWriter):
        def write(self, example):
            if b"Number 1." not in example:
                super().write(example)

    monkeypatch.setattr(array_record, "ArrayRecordWriter", Deaf)
    with pytest.raises(OSError, match=r"/finished/\w+\.\d+\.new holds 5 of 6 records: is the disk full"):
        build(write(folders / "in", texts(6), files=1))
    assert not [file for file in folders.glob("tfds/c4/en/*/finished/*") if not file.suffix]


def test_full_disk_ends_the_command_in_one_line(folders):
    noise = [os.urandom(3000).hex() for _ in range(20)]
    words = ["scripts/c4_from_json.py", f"--input={write(folders / 'in', noise)}", "--workers=1"]
    code = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    code += "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command, environment = [sys.executable, "-c", code, *words], {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = run.stderr.splitlines()[-1]
    assert run.returncode == 74 and said.startswith("error: ") and "Traceback" not in run.stderr
    assert re.search(r"/finished/\w+ cannot be written \(", said) and "File too large" in said
    assert not list(folders.rglob("*.new"))


@pytest.mark.parametrize("terminal", [True, False])
def test_bar_tells_files_and_speed_at_a_terminal_alone(folders, capsys, monkeypatch, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    build(write(folders / "in", texts(6)))
    said = capsys.readouterr().err
    assert ("4/4 files" in said and "documents/s" in said) if terminal else said == ""


def test_command_names_and_counts_what_it_leaves_out(folders, capsys):
    folder = folders / "in"
    folder.mkdir()
    (folder / "a.json").write_text(line("one") + "{\n")
    (folder / "b-validation.json").write_text("[]\n" + line("two"))
    argv = ["c4_from_json", f"--input={folder}/*.json", "--workers=1", "--skip_broken"]
    assert c4_from_json.main(argv) == 0
    captured = capsys.readouterr()
    assert captured.out == f"2 documents of 2 files in {dataset(folders)}\n"
    assert f"{folder}/a.json:2 is broken" in captured.err
    assert captured.err.endswith("left out: 2 broken lines in 2 of 2 files\n")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input=nothing*.gz"], "no file is named --input=nothing*.gz"),
        ([], "no file is named --input="),
        (["--input=a.json", "--workers=many"], "--workers=many is no whole number"),
        (["--input=a.json", "--workers=-1"], "--workers=-1"),
        (["--input=a.json", "--version=latest"], "--version=latest is no version"),
        (["--inptu=a.json"], "inptu"),
        (["--input=a.json", "b.json"], "unexpected argument 'b.json': quote patterns"),
    ],
)
def test_wrong_command_line_is_named_in_one_line(folders, monkeypatch, capsys, words, said):
    monkeypatch.chdir(folders)
    pathlib.Path("a.json").write_text(line("one"))
    with pytest.raises(SystemExit) as stop:
        cli.main(c4_from_json.main, c4_from_json.__doc__, ["c4_from_json", *words])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and error.startswith("error: ") and said in error and "\n" not in error
    assert not (folders / "tfds").exists()
