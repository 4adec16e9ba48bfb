import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as library
from hypothesis import given
from hypothesis import strategies as st

from relora_jax.config import DataConfig
from relora_jax.data import file_source
from relora_jax.data.packing import Packer
from relora_jax.data.prepared import find_tokenizer, prepare, tokenizer_of, train_texts
from relora_jax.data.shards import Block, End, Job
from relora_jax.data.source import BadDocumentError, Stripe
from relora_jax.data.stores import OrderedBlocks, PrepareOptions
from relora_jax.storage import places
from relora_jax.tokenizer import tokenizer as tokenizers
from tests.support.documents import texts
from tests.support.own_text import BLOCK, LENGTH, SIZES, config

FIND = file_source.find


@pytest.fixture(autouse=True)
def small_blocks(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    find = lambda *args, **kwargs: dataclasses.replace(FIND(*args, **kwargs), block_documents=BLOCK)  # noqa: E731
    monkeypatch.setattr(file_source, "find", find)


def prepared_files(cache, monkeypatch, data, options=PrepareOptions()):  # noqa: B008
    """{file of the store: its bytes} after preparing `data` in the given cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = prepare(data, options).train.path.parent
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.is_file()}


def blocks_of(folder):
    """(train, validation) documents of each block."""
    for k in range(len(SIZES)):
        content = gzip.decompress((folder / f"{k}.jsonl.gz").read_bytes()).decode()
        documents = [json.loads(line)["text"] for line in content.splitlines()]
        for start in range(0, len(documents), BLOCK):
            parts = [], []
            for text in documents[start : start + BLOCK]:
                hashed = hashlib.sha256(text.encode()).digest()[:8]
                parts[int.from_bytes(hashed, "big") / 2**64 < 0.3].append(text)
            yield parts


def packed(documents, tokenizer):
    packer = Packer("concatenate", length=LENGTH, eos=tokenizer.eos, pad=tokenizer.pad)
    return packer.add(tokenizer.encode_documents(documents)).ids


def test_one_pass_builds_both_stores_with_each_document_in_its_part_and_block(folder):
    prepared = prepare(config(folder))
    for at, store in enumerate((prepared.train, prepared.validation)):
        rows = np.concatenate([packed(parts[at], prepared.tokenizer) for parts in blocks_of(folder)])
        assert (store.read(range(store.rows))[0] == rows).all()
        assert store.manifest["documents"] == sum(len(parts[at]) for parts in blocks_of(folder))
        assert store.counts.tolist() == np.bincount(rows.ravel(), minlength=380).tolist()
    assert prepared.train.manifest["text"] == {
        "files": 5,
        "of_files": 5,
        "of_documents": None,
        "skipped": 0,
    }
    assert prepared.train.path.parent == prepared.validation.path.parent


def test_store_does_not_depend_on_the_workers(folder, tmp_path, monkeypatch):
    for k in (1, 4):
        content = gzip.decompress((folder / f"{k}.jsonl.gz").read_bytes())
        (tmp_path / f"{k}.jsonl").write_bytes(content)
    data = config(folder, text=f"{tmp_path}/*.jsonl")
    alone = prepared_files(tmp_path / "1", monkeypatch, data)
    assert len(alone) > 14 and not any(name.startswith("blocks") for name in alone)
    for workers in (2, 3):  # more workers than files, which they share
        assert (
            prepared_files(tmp_path / f"{workers}", monkeypatch, data, PrepareOptions(workers=workers))
            == alone
        )


def test_more_files_leave_the_rows_of_the_others_as_they_are(folder, tmp_path, monkeypatch):
    before = prepared_files(tmp_path / "1", monkeypatch, config(folder))
    (more := tmp_path / "more").mkdir()
    for file in folder.glob("*.gz"):
        (more / file.name).write_bytes(file.read_bytes())
    (more / "9.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "new " * 900}).encode()))
    data = config(folder, text=str(more / "*.gz"))
    after = prepared_files(tmp_path / "2", monkeypatch, data)
    shards = {name for name in before if name.endswith("array_record")}
    assert {name: after[name] for name in shards} == {name: before[name] for name in shards}
    assert [name for name in after if name not in before] == ["train/00005-00000.array_record"]


@pytest.mark.parametrize("workers", [1, 3])
def test_store_ends_with_the_first_block_that_reaches_train_tokens(folder, tmp_path, monkeypatch, workers):
    everything = prepare(config(folder))
    shards = everything.train.manifest["shards"]
    tokens = np.cumsum([shard["tokens"] for shard in shards]).tolist()
    for budget, blocks in ((tokens[4], 5), (tokens[4] + 1, 6), (1, 1)):
        data = config(folder, train_tokens=budget)
        files = prepared_files(tmp_path / f"{budget}", monkeypatch, data, PrepareOptions(workers=workers))
        train, validation = (json.loads(files[f"{part}/manifest.json"]) for part in file_source.PARTS)
        assert train["shards"] == shards[:blocks] and train["tokens"] == tokens[blocks - 1] >= budget
        assert validation["shards"] == everything.validation.manifest["shards"][:blocks]
        on_disk = [name for name in files if name.startswith("train/") and name.endswith("record")]
        assert len(on_disk) == sum(shard["rows"] > 0 for shard in train["shards"])
        if workers == 3:
            break


def test_nothing_is_read_beyond_the_train_tokens(folder, monkeypatch):
    opened, blocks = [], file_source.Files.blocks
    spy = lambda self, file: opened.append(file) or blocks(self, file)  # noqa: E731
    monkeypatch.setattr(file_source.Files, "blocks", spy)
    prepare(config(folder, train_tokens=600))
    assert opened == [0, 1]


def test_too_many_train_tokens_use_everything_and_warn(folder, capsys):
    everything = prepare(config(folder)).train
    capsys.readouterr()
    store = prepare(config(folder, train_tokens=10**6)).train
    assert store.manifest["shards"] == everything.manifest["shards"]
    assert f"only {store.tokens:,} tokens, fewer than data.train_tokens=1,000,000" in capsys.readouterr().err


@given(
    sizes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=5),
    budget=st.integers(0, 40),
    order=st.randoms(use_true_random=False),
)
def test_ordered_blocks_are_complete_once_the_first_to_reach_the_budget_arrived(sizes, budget, order):
    every = [Block(f, n, 1, [{"tokens": t}]) for f, tokens in enumerate(sizes) for n, t in enumerate(tokens)]
    reached = [sum(b.parts[0]["tokens"] for b in every[: k + 1]) >= budget > 0 for k in range(len(every))]
    expected = every[: reached.index(True) + 1] if any(reached) else every
    messages = [*every, *(End(f, len(tokens)) for f, tokens in enumerate(sizes))]
    order.shuffle(messages)
    ordered = OrderedBlocks(len(sizes), budget)
    for k in range(len(messages) + 1):
        if k:
            ordered.add(messages[k - 1])
        blocks = [m for m in messages[:k] if isinstance(m, Block)]
        ends = [m for m in messages[:k] if isinstance(m, End)]
        last = expected[-1].file if any(reached) else len(sizes)
        complete = {*range(last)} <= {end.file for end in ends} and all(block in blocks for block in expected)
        assert ordered.complete == complete and (ordered.blocks == expected or not complete)


def test_ordering_blocks_of_many_files_takes_linear_time():
    ordered, start = OrderedBlocks(10_000, 0), time.process_time()
    for file in range(9_999, -1, -1):
        ordered.add(Block(file, 0, 1, [{"tokens": 1}]))
        ordered.add(End(file, 1))
    assert ordered.complete and len(ordered.blocks) == 10_000 and time.process_time() - start < 2


def test_too_many_files_to_open_are_refused_before_any_work(folder, tmp_path, monkeypatch):
    for k, text in enumerate(texts(9)):
        (tmp_path / f"{k}.txt").write_text(text * 9)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (520, 520))
    monkeypatch.setattr(Job, "_build", lambda *_: pytest.fail("built"))
    data = config(folder, text=f"{tmp_path}/*.txt")
    message = r"0\.txt and 8 more has 9 shards, .* 520 files open: .* to 521, or join small files into"
    with pytest.raises(ValueError, match=message):
        prepare(data)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (600, 600))
    assert prepare(data).train.rows > 8


KILLED = """
import dataclasses, os, pathlib, signal, sys
from relora_jax.data import file_source as files, shards
from relora_jax.data.prepared import prepare
from tests.support.own_text import config, BLOCK
find = files.find
files.find = lambda *a, **k: dataclasses.replace(find(*a, **k), block_documents=BLOCK)
if __name__ == "__main__":
    remaining = [int(sys.argv[2])]
    build = shards.Job._build
    def kill_after(self, *args):
        for message in build(self, *args):
            yield message
            remaining[0] -= isinstance(message, shards.Block)
            if remaining[0] < 0 or not remaining[0] and isinstance(message, shards.Progress):
                os.kill(os.getpid(), signal.SIGKILL)  # in the middle of a block
    shards.Job._build = kill_after
    prepare(config(pathlib.Path(sys.argv[1])))
"""


def test_another_process_may_remove_the_blocks_at_the_same_time(folder, monkeypatch):
    unlink = os.unlink

    def removed_by_another(name, **options):
        unlink(name, **options)
        if "dir_fd" in options:  # while a directory is removed
            raise FileNotFoundError(name)

    monkeypatch.setattr(os, "unlink", removed_by_another)
    assert not (prepare(config(folder)).train.path.parent / "blocks").exists()


def test_killed_preparation_resumes_with_the_missing_blocks(folder, tmp_path, monkeypatch):
    expected = prepared_files(tmp_path / "1", monkeypatch, config(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "2"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), "4"])
    assert killed.returncode == -9
    [partial] = (places.cache_dir() / "rows").glob("*.partial")
    assert len(list((partial / "blocks").glob("*.json"))) == 4
    built, build = [], Job._build
    spy = lambda self, *args: built.append(args[:2]) or build(self, *args)  # noqa: E731
    monkeypatch.setattr(Job, "_build", spy)
    assert prepared_files(tmp_path / "2", monkeypatch, config(folder)) == expected
    everything = [(f, n) for f, size in enumerate(SIZES) for n in range(-(-size // BLOCK))]
    assert built == everything[4:] and not partial.exists()


def test_block_with_a_deleted_shard_is_rebuilt(folder, tmp_path, monkeypatch):
    expected = prepared_files(tmp_path / "1", monkeypatch, config(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "2"))
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), "5"]).returncode == -9
    [partial] = (places.cache_dir() / "rows").glob("*.partial")
    (partial / "train" / "00001-00000.array_record").unlink()
    assert prepared_files(tmp_path / "2", monkeypatch, config(folder)) == expected


@pytest.mark.parametrize("size", [0, 9, None])
@pytest.mark.parametrize("name", ["00001-00000.json", "00000.end", "00001-00001.counts.npy"])
def test_empty_truncated_or_missing_record_is_rebuilt(folder, tmp_path, monkeypatch, name, size):
    expected = prepared_files(tmp_path / "1", monkeypatch, config(folder))
    with monkeypatch.context() as patch:
        patch.setattr(Job, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared_files(tmp_path / "2", patch, config(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "2"))
    [file] = (places.cache_dir() / "rows").glob(f"*.partial/blocks/{name}")
    file.unlink() if size is None else os.truncate(file, min(size, file.stat().st_size - 1))
    (file.parent / "00004.end").write_text("4")  # no such record
    assert prepared_files(tmp_path / "2", monkeypatch, config(folder)) == expected


def test_short_files_need_little_disk_space_and_are_read_once(folder, tmp_path, monkeypatch):
    for k, text in enumerate(["too short for a row", *texts(9)]):
        (tmp_path / f"{k}.txt").write_text(text)
    data = config(folder, text=f"{tmp_path}/*.txt", validation_fraction=0.5)
    with monkeypatch.context() as patch:
        patch.setattr(Job, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(data)
    sizes = [file.stat().st_size for file in places.cache_dir().glob("rows/*.partial/blocks/*.npy")]
    assert len(sizes) == 10 and max(sizes) < 380 * 8  # half of 8 bytes for each piece of each part
    monkeypatch.setattr(Job, "_build", lambda *_: pytest.fail("built again"))
    for store in prepare(data)[1:]:
        ids = store.read(range(store.rows))[0]
        assert store.counts.tolist() == np.bincount(ids.ravel(), minlength=380).tolist() and sum(store.counts)


def test_every_file_of_a_store_is_synced_before_it_is_renamed(folder, tmp_path, monkeypatch):
    synced, fsync = set(), os.fsync
    spy = lambda file: synced.add(os.fstat(file).st_ino) or fsync(file)  # noqa: E731
    monkeypatch.setattr(os, "fsync", spy)
    replace, named = pathlib.Path.replace, []

    def renamed(self, target):
        assert self.stat().st_ino in synced, target
        named.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", renamed)
    files = prepared_files(tmp_path / "1", monkeypatch, config(folder))
    assert {pathlib.Path(name).name for name in files} <= set(named)
    assert {"00000.end", "00001-00000.json", "00001-00000.counts.npy"} <= set(named)


def test_finished_files_are_not_opened_again(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "2"))
    assert subprocess.run([sys.executable, "-c", KILLED, str(folder), "6"]).returncode == -9
    opened, blocks = [], file_source.Files.blocks
    spy = lambda self, file: opened.append(file) or blocks(self, file)  # noqa: E731
    monkeypatch.setattr(file_source.Files, "blocks", spy)
    prepare(config(folder))
    assert opened == [2, 3, 4]  # 2 + 3 blocks, and one of the third file


BAD = {  # line without text that can be read: how it is named
    b'{"text": null}': "'text' is null, not text",
    b'{"text": 3}': "'text' is int, not text",
    b'{"text": "half \\ud83d"}': "has half of a surrogate pair",
    b'{"text": "caf\xe9 "}': "is not UTF-8",
    b'{"text": "cut': "is not JSON",
    b"[]": "is not a JSON object but list",
    b'{"txt": "x"}': "has no field 'text'",
}
MIXED = {  # file: number of documents, and the numbers of those before which a bad line is
    "a": (30, [0, 5, 5, 7, 8, 20, 29, 30]),
    "b": (0, [0] * 11),
    "c": (4 * BLOCK, [3, 4 * BLOCK, 4 * BLOCK]),
}


@pytest.fixture
def mixed(tmp_path):
    """(pattern of documents, that of the same with bad lines among them, [(file and line, problem), ...])"""
    documents, kinds, bad = iter(texts(99)), itertools.cycle(BAD), []
    for name, (count, numbers) in MIXED.items():
        good, lines = [json.dumps({"text": next(documents)}).encode() for _ in range(count)], []
        for number in range(count + 1):
            for _ in range(numbers.count(number)):
                lines.append(next(kinds))
                bad.append((f"{tmp_path}/bad/{name}.jsonl, line {len(lines)}", BAD[lines[-1]]))
            lines += good[number : number + 1]
        for folder, content in (("good", good), ("bad", lines)):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.jsonl").write_bytes(b"\n".join(content))
    return tmp_path / "good/*", tmp_path / "bad/*", bad


def skipping(workers=1):
    return PrepareOptions(skip_bad_documents=True, workers=workers)


def shards_of(files):
    return {name: content for name, content in files.items() if name.endswith(".array_record")}


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_document_is_named_with_the_flag_that_skips_it(folder, mixed, workers):
    _, text, bad = mixed
    with pytest.raises(BadDocumentError) as raised:
        prepare(config(folder, text=str(text)), PrepareOptions(workers=workers))
    message = str(raised.value)
    locations = [location for location, problem in bad if message.startswith(location) and problem in message]
    assert locations == [bad[0][0]] if workers == 1 else locations
    assert message.endswith(", or skip such documents (prepare --skip_bad_documents)")


def test_unfinished_stores_of_a_damaged_file_are_removed(folder, tmp_path):
    (damaged := tmp_path / "damaged").mkdir()
    for file in sorted(folder.glob("*.gz")):
        (damaged / file.name).write_bytes(file.read_bytes())
    (damaged / "3.jsonl.gz").write_bytes((folder / "3.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"3\.jsonl\.gz is damaged"):
        prepare(config(folder, text=f"{damaged}/*"), skipping())
    assert not list((places.cache_dir() / "rows").glob("*.partial"))


def test_skipping_bad_documents_leaves_the_rows_of_the_others_as_without_them(
    folder, mixed, tmp_path, monkeypatch, capsys
):
    good, text, bad = mixed
    expected = prepared_files(tmp_path / "g", monkeypatch, config(folder, text=str(good)))
    capsys.readouterr()
    first = prepared_files(tmp_path / "1", monkeypatch, data := config(folder, text=str(text)), skipping())
    assert shards_of(first) == shards_of(expected) and len(shards_of(first)) > 8
    for part in file_source.PARTS:
        manifests = [json.loads(files[f"{part}/manifest.json"]) for files in (expected, first)]
        assert [manifest["text"]["skipped"] for manifest in manifests] == [0, len(bad)]
        for name in ("documents", "rows", "tokens", "given"):
            assert manifests[0][name] == manifests[1][name]
    head, *named, rest = [line for line in capsys.readouterr().err.splitlines() if "dropped" not in line]
    assert head == f"{len(bad)} bad documents of {text.parent}/a.jsonl and 2 more are skipped:"
    assert len(named) == 10 and rest == f"  and {len(bad) - 10} more"
    for line, (location, problem) in zip(named, bad, strict=False):
        assert line.startswith(f"  {location}") and problem in line and "prepare" not in line
    for workers in (2, 4):  # which share the files
        again = prepared_files(tmp_path / f"{workers}", monkeypatch, data, skipping(workers))
        assert again == first and f"\n  {bad[0][0]}" in capsys.readouterr().err
    prepared_files(tmp_path / "1", monkeypatch, data)  # rows that exist need no flag


def test_skipping_changes_nothing_where_no_document_is_bad(folder, tmp_path, monkeypatch):
    strict = prepared_files(tmp_path / "1", monkeypatch, config(folder))
    assert prepared_files(tmp_path / "2", monkeypatch, config(folder), skipping()) == strict


def stopped(monkeypatch, data, options, *, blocks):
    """A preparation of `data` that ends after so many blocks, as by a kill, or at a bad document."""
    build, remaining = Job._build, itertools.count(blocks, -1)

    def limited(self, *args):
        if not next(remaining):
            raise KeyboardInterrupt
        yield from build(self, *args)

    # the odd blocks of each file first, as two workers may build them
    stripes = lambda self, _: [Stripe(f, n, 2) for f in range(self.files) for n in (1, 0)]  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(Job, "_build", limited)
        patch.setattr(file_source.Files, "stripes", stripes)
        with pytest.raises((KeyboardInterrupt, BadDocumentError)):
            prepare(data, options)


@pytest.mark.parametrize(
    "blocks", [1, 4, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 5, 6, 7))]
)
@pytest.mark.parametrize("skips", [False, True])
def test_preparation_may_go_on_with_skipping_or_without(
    folder, mixed, tmp_path, monkeypatch, capsys, blocks, skips
):
    _, text, bad = mixed
    data = config(folder, text=str(text))
    expected = prepared_files(tmp_path / "1", monkeypatch, data, skipping())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "2"))
    stopped(monkeypatch, data, PrepareOptions(skip_bad_documents=skips), blocks=blocks)
    stopped(monkeypatch, data, PrepareOptions(skip_bad_documents=not skips), blocks=2)
    capsys.readouterr()
    assert prepared_files(tmp_path / "2", monkeypatch, data, skipping()) == expected
    assert f"{len(bad)} bad documents" in capsys.readouterr().err


def test_blocks_before_a_bad_document_are_not_built_again(folder, mixed, monkeypatch):
    good, text, _ = mixed
    (text.parent / "0.jsonl").write_bytes((good.parent / "c.jsonl").read_bytes())
    data = config(folder, text=str(text))
    with pytest.raises(BadDocumentError, match=r"a\.jsonl, line 1: "):
        prepare(data)
    built, build = [], Job._build
    spy = lambda self, *args: built.append(args[:2]) or build(self, *args)  # noqa: E731
    monkeypatch.setattr(Job, "_build", spy)
    prepare(data, skipping())
    assert built[0] == (1, 0)  # all of the first file was kept


def test_text_of_bad_documents_alone_is_named(folder, mixed, capsys):
    _, text, _ = mixed
    data = config(folder, text=f"{text.parent}/b*", validation_text=f"{text.parent}/[ac]*")
    with pytest.raises(ValueError, match=r"b\.jsonl: the train part has too little text for one row"):
        prepare(data, skipping())
    assert f"11 bad documents of {text.parent}/b.jsonl are skipped" in capsys.readouterr().err


def test_tokenizer_is_trained_without_the_bad_documents(folder, mixed):
    good, text, _ = mixed
    data = config(folder, text=str(text), tokenizer="bpe(330)")
    with pytest.raises(BadDocumentError):
        find_tokenizer(data)
    trained = find_tokenizer(data, skipping()).sha256
    assert trained == find_tokenizer(dataclasses.replace(data, text=str(good))).sha256
    assert trained == find_tokenizer(data).sha256  # one that exists needs no flag
    rows = prepare(data, skipping()).train.manifest["key"]
    shutil.rmtree(places.cache_dir() / "tokenizers")
    assert trained == tokenizer_of(data, rows).sha256  # as `generate` finds it


def test_too_little_text_is_reported_with_a_remedy(folder):
    with pytest.raises(ValueError, match=r"validation part .* raise data\.validation_fraction"):
        prepare(config(folder, validation_fraction=1e-9))
    with pytest.raises(ValueError, match=r"train part has too little text for one row of data\.seq.*=200000"):
        prepare(config(folder, sequence_length=200_000))


@pytest.mark.parametrize("name", ["book.txt", "book.txt.gz"])
def test_single_text_file_is_rejected_as_one_document_before_it_is_read(folder, tmp_path, monkeypatch, name):
    book = "\n".join(texts(900)).encode()
    (tmp_path / name).write_bytes(gzip.compress(book) if name.endswith(".gz") else book)
    monkeypatch.setattr(file_source.Files, "blocks", lambda *_: pytest.fail("read"))
    for tokenizer in ("bpe(330)", str(folder / "t.model")):
        data = config(folder, text=f"{tmp_path}/book*", tokenizer=tokenizer)
        for refused in (prepare, find_tokenizer):
            with pytest.raises(ValueError, match=rf"{name} is a single document, .*: split it .*\.jsonl"):
                refused(data)


def test_single_document_is_rejected_but_may_train_a_tokenizer(folder, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\n".join(texts(99))}))
    (tmp_path / "b.txt").write_text("\n".join(texts(99)))
    for fraction in (1e-9, 1 - 1e-9):  # in either part
        data = config(folder, text=f"{tmp_path}/a*", validation_fraction=fraction)
        with pytest.raises(ValueError, match=r"a\.jsonl is a single document, so nothing can be held out"):
            prepare(data)
    [text] = train_texts(config(folder, text=f"{tmp_path}/b*", validation_fraction=1e-9))
    assert text.startswith("Number 0")


def test_warns_of_tokens_dropped_from_many_small_files(folder, tmp_path, capsys):
    prepare(config(folder))
    assert "are dropped" in (output := capsys.readouterr().err) and output.count("\n") <= 2
    for k, text in enumerate(texts(50)):
        (tmp_path / f"{k}.txt").write_text(text)
    train = prepare(config(folder, text=f"{tmp_path}/*.txt")).train
    share = f"{100 * train.manifest['dropped']:.0f}% of the train tokens of {tmp_path}/0.txt and 49 more"
    assert f"{share} are dropped at ends of blocks and files: join small files" in capsys.readouterr().err


def test_file_in_both_texts_is_refused_however_it_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for text, held in ((str(folder), folder.name), (folder.name, str(folder))):
        data = config(folder, text=text, validation_text=f"{held}/{{0,1}}.jsonl.gz")
        with pytest.raises(ValueError, match=r"/0\.jsonl\.gz is in data\.text and in data\.validation_text"):
            prepare(data)


def test_tokenizer_is_trained_only_on_train_documents(folder, tmp_path):
    trained = prepare(config(folder, tokenizer="bpe(330)")).tokenizer
    train = [text for parts in blocks_of(folder) for text in parts[0]]
    lines = tokenizers._lines(train)
    assert trained.sha256 == tokenizers.train(lines, kind="bpe", vocab_size=330, path=tmp_path / "o").sha256


def start_command(folder, directory, count, size):
    """A process that runs `prepare` with two workers on `count` files of `size` documents each."""
    (directory / "c.py").write_text(
        "import pathlib\nfrom tests.support import own_text, small\n"
        "def get_config(arm='relora'):\n    config = small.config()\n    config.model.vocab_size = 380\n"
        f"    config.data = own_text.config(pathlib.Path({str(folder)!r}))\n    return config\n"
    )
    for k in range(count):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(200, seed=k))
        (directory / f"{k}.jsonl").write_text(lines * (size // 200))
    args = [f"--config={directory}/c.py", f"--text={directory}/*.jsonl", "--workers=2"]
    # a shell starts background jobs with SIGINT ignored
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "relora_jax.prepare", *args],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as on a terminal, where Ctrl-C reaches the workers too
        )
    finally:
        signal.signal(signal.SIGINT, handler)


def in_group(number):
    """The running processes of a group, without zombies."""
    pids = []
    for file in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = file.read_text().rpartition(")")[2].split()[:3]
            pids += [file.parent.name] if int(group) == number and state != "Z" else []
    return pids


def wait_for_rows(process):
    """Returns when the process is in the middle of a block, or has ended."""
    while process.poll() is None and not list(places.cache_dir().glob("rows/*.partial/train/*.new")):
        time.sleep(0.01)


def test_interrupted_command_ends_in_one_line_without_its_workers(folder, tmp_path):
    with start_command(folder, tmp_path, 2, 20_000) as process:
        wait_for_rows(process)
        os.killpg(process.pid, signal.SIGINT)
        output = process.stderr.read()  # pyright: ignore
        assert process.wait(20) == 130 and "Traceback" not in output
    assert output.splitlines()[-1] == "interrupted: run the same command again to resume"
    deadline = time.monotonic() + 20
    while running := in_group(process.pid):
        assert time.monotonic() < deadline, running
        time.sleep(0.05)


@pytest.mark.slow
def test_repeatedly_killed_command_builds_the_same_files(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(file_source, "find", FIND)  # blocks of the usual size
    finished = lambda: len(list((places.cache_dir() / "rows").glob("*.partial/blocks/*.json")))  # noqa: E731
    for blocks in (0, 2, 6):
        with start_command(folder, tmp_path, 10, 6_000) as process:
            wait_for_rows(process)
            while finished() < blocks and process.poll() is None:
                time.sleep(0.01)
            process.kill()
        assert blocks <= finished() < 10
    with start_command(folder, tmp_path, 10, 6_000) as process:
        process.communicate()
    assert process.returncode == 0
    [resumed] = (places.cache_dir() / "rows").glob("*/train")
    data = config(folder, text=f"{tmp_path}/*.jsonl")
    alone = prepared_files(tmp_path / "alone", monkeypatch, data)
    assert alone == {str(f.relative_to(resumed.parent)): f.read_bytes() for f in resumed.parent.rglob("*.*")}


def test_eos_that_a_text_can_spell_is_reported_when_rows_are_built(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a b c\n" * 9)
    (tmp_path / "b.txt").write_text("d e\n" * 9)
    raw = library.Tokenizer(library.models.BPE({c: i for i, c in enumerate("abcde \n")}, []))
    raw.save(str(tmp_path / "tokenizer.json"))
    data = DataConfig(
        text=str(tmp_path / "a.txt"),
        validation_text=str(tmp_path / "b.txt"),
        tokenizer=str(tmp_path / "tokenizer.json"),
        eos_id=6,
        sequence_length=4,
    )
    prepare(data)
    err = capsys.readouterr().err
    assert r"'\n' in a text has the id of eos, 6, in the middle of a document" in err
    assert err.count("note:") == 1
    prepare(data)
    assert capsys.readouterr().err == ""
