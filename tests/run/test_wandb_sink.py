"""Weights & Biases: TensorBoard's curves, one W&B run per workdir, and no failure ends the training."""

import importlib.metadata
import json
import pathlib
import struct
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from relora_jax import loop
from relora_jax.data import batches
from relora_jax.run import wandb_sink
from relora_jax.run.opening import OpenRun
from relora_jax.run.wandb_sink import WeightsAndBiases
from relora_jax.storage.writer import Writer
from tests.support import small
from tests.support.commands import Sandbox

TRAIN = {"kind": "train", "update": 6, "loss": 2.5, "lr": 0.0, "grad_norm": None, "elapsed_s": 9.0}
EVAL = {"kind": "eval", "update": 7, "loss": 3.0, "perplexity": 20.0, "tokens": 5}


class Fake:
    """Replaces the package and its run: records the calls, and fails in the call named `fails`."""

    def __init__(self, *, step: int = 0, fails: str = "") -> None:
        self.step, self.fails, self.calls = step, fails, []
        self.settings: dict[str, Any] = {}

    def _record(self, name: str, *args: Any) -> None:
        self.calls.append((name, *args))
        if name == self.fails:
            raise RuntimeError("no\nroute to host")

    def init(self, **settings: Any) -> "Fake":
        self.settings = settings
        self._record("init")
        return self

    def log(self, points: dict[str, float], *, step: int) -> None:
        self._record("log", points, step)

    def finish(self) -> None:
        self._record("finish")


@pytest.fixture
def opened(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """opened(fake, resumed=, project=): the sink of one start in tmp_path."""

    def opened(fake: Fake, *, resumed: bool = False, project: str = "p") -> WeightsAndBiases:
        package = types.SimpleNamespace(init=fake.init, Settings=lambda **settings: settings)
        monkeypatch.setitem(sys.modules, "wandb", package)
        return WeightsAndBiases(Writer(tmp_path), project=project, config={"seed": 3}, resumed=resumed)

    return opened


def test_rows_become_points_at_their_update_without_missing_values(opened: Any) -> None:
    fake = Fake()
    sink = opened(fake)
    for row in (TRAIN, {"kind": "restart", "update": 6, "merged": True, "reset": True}, EVAL):
        sink.write(row)
    sink.flush()
    sink.close()
    assert fake.calls == [
        ("init",),
        ("log", {"train/loss": 2.5, "train/lr": 0.0}, 6),
        ("log", {"validation/loss": 3.0, "validation/perplexity": 20.0, "validation/tokens": 5}, 7),
        ("finish",),
    ]
    assert fake.settings["config"] == {"seed": 3} and fake.settings["project"] == "p"


def test_resumed_run_continues_the_same_wandb_run_and_another_starts_its_own(opened: Any) -> None:
    ids = []
    for start in ({}, {"resumed": True}, {"resumed": True}, {}, {"resumed": True, "project": "q"}):
        fake = Fake()
        opened(fake, **start)
        assert fake.settings["resume"] == "allow"
        ids.append(fake.settings["id"])
    assert ids[0] == ids[1] == ids[2] and len({ids[0], ids[3], ids[4]}) == 3


@pytest.mark.parametrize(("step", "sent"), [(0, [6, 7]), (6, [6, 7]), (7, [7]), (8, [])])
def test_update_that_was_sent_before_is_not_sent_again(opened: Any, step: int, sent: list[int]) -> None:
    fake = Fake(step=step)
    sink = opened(fake, resumed=True)
    sink.write(TRAIN)
    sink.write(EVAL)
    assert [call[2] for call in fake.calls if call[0] == "log"] == sent


@pytest.mark.parametrize(("fails", "calls"), [("init", 1), ("log", 2), ("finish", 4), ("", 4)])
def test_failure_is_one_line_of_warning_and_the_last_call(
    opened: Any, fails: str, calls: int, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(fails=fails)
    sink = opened(fake)
    for row in (TRAIN, EVAL):
        sink.write(row)
    sink.close()
    sink.close()
    warning = "warning: Weights & Biases failed; training continues without it: no route to host\n"
    assert (capsys.readouterr().err, len(fake.calls)) == (warning if fails else "", calls)


def test_missing_package_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_sink.check("p")

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(wandb_sink, "version", version)
    wandb_sink.check("")
    with pytest.raises(ValueError, match=r"^train\.wandb 'p' needs .* pip install 'relora-jax\[wandb\]'"):
        wandb_sink.check("p")


def test_only_the_process_that_writes_sends(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    class Recording(WeightsAndBiases):
        def __init__(self, writer: Writer, **kwargs: Any) -> None:
            calls.append(kwargs)

    def sinks(config: Any, *, active: bool, resumed: bool = False) -> int:
        facts = {"config": config, "writer": Writer(tmp_path, active=active), "update": 8, "resumed": resumed}
        run = object.__new__(OpenRun)  # nothing else of it is used
        for name, value in facts.items():
            object.__setattr__(run, name, value)
        return len(loop._sinks(run))

    monkeypatch.setattr(wandb_sink, "WeightsAndBiases", Recording)
    config = small.config(train__wandb="p")
    assert [sinks(config, active=True), sinks(config, active=True, resumed=True)] == [2, 2]
    assert sinks(config, active=False) == 0 and sinks(small.config(), active=True) == 1
    assert [call["resumed"] for call in calls] == [False, True]
    assert calls[0]["project"] == "p" and calls[0]["config"]["relora"]["rank"] == 3


def points(workdir: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
    """(id, point) of all offline files of a workdir, in order of their starts.

    Such a file is a header of 7 bytes, then blocks of 32 KiB that consist of chunks: checksum, length, kind
    (1 whole, 2 first, 3 middle, 4 last), bytes of a record.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore

    def records(content: bytes) -> Iterator[Any]:
        offset, record = 7, b""
        while offset + 7 <= len(content):
            if 2**15 - offset % 2**15 < 7:  # no room for a chunk: the rest of the block is padding
                offset += 2**15 - offset % 2**15
                continue
            size, kind = struct.unpack("<HB", content[offset + 4 : offset + 7])
            record, offset = record + content[offset + 7 : offset + 7 + size], offset + 7 + size
            if kind in (1, 4):
                yield Record.FromString(record)
                record = b""

    result, run = [], ""
    for file in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for record in records(file.read_bytes()):
            run = record.run.run_id or run
            if record.HasField("history"):
                items = record.history.item
                keys = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                result.append((run, keys))
    return result


OFFLINE = {"WANDB_MODE": "offline", "PYTHONWARNINGS": "error"}


@pytest.mark.slow
def test_command_sends_each_row_and_can_isolate_documents(tmp_path: pathlib.Path) -> None:
    sandbox = Sandbox(tmp_path)
    settings = ("attend_across_documents=false", "sequence_length=40")
    args = [f"--config={tmp_path / 'toy.py'}:full", *(f"--config.data.{setting}" for setting in settings)]
    counts = ("updates=3", "evaluate_every_updates=3", "eval_tokens=100000", "wandb=p")
    args += [f"--config.train.{setting}" for setting in counts]
    process = sandbox.train(*args, workdir="run", **OFFLINE)
    assert process.returncode == 0, process.stderr
    rows = sandbox.rows("run")
    sent = points(tmp_path / "run")
    assert len({run for run, _ in sent}) == 1 and [point["_step"] for _, point in sent] == [0, 1, 2, 3]
    losses = [point.get("train/loss") for _, point in sent]
    assert losses == [None, *(row["loss"] for row in rows if row["kind"] == "train")]
    last = sent[-1][1]
    [evaluated] = [row for row in rows if row["kind"] == "eval" and row["update"] == 3]
    assert last["validation/perplexity"] == evaluated["perplexity"]

    manifests = (tmp_path / "cache/relora_jax/rows").glob("*/*/manifest.json")
    stores = [batches.RowStore.open(file.parent) for file in manifests]
    by_split = {store.manifest["part"]: store for store in stores}

    def counted(store: batches.RowStore, indices: Any) -> int:
        ids, _ = store.read(list(indices))
        return int(np.sum(ids[:, :-1] != store.eos))

    everything = range(by_split["validation"].rows)
    assert last["validation/tokens"] == counted(by_split["validation"], everything) < 40 * len(everything)
    store = by_split["train"]
    stream = [batches.row_index(i, rows=store.rows, seed=0) for i in range(3 * 8)]
    assert last["train/tokens_seen"] == counted(store, stream) < 40 * 24


@pytest.mark.slow
def test_stopped_and_resumed_run_is_one_wandb_run_with_each_update_once(tmp_path: pathlib.Path) -> None:
    sandbox = Sandbox(tmp_path)
    args = [f"--config={tmp_path / 'toy.py'}:full", "--config.train.wandb=p"]
    assert sandbox.train(*args, workdir="run", KILL_AT="7 15", **OFFLINE).returncode == 75
    assert sandbox.train(*args, workdir="run", **OFFLINE).returncode == 0
    sent = points(tmp_path / "run")
    assert len({run for run, _ in sent}) == 1
    assert [point["_step"] for _, point in sent] == list(range(21))
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
