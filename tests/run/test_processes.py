"""Several processes of one run: real ones, of two CPU devices each, on the loopback interface."""

import pathlib
import random
import shutil
import signal
import socket
import time
from typing import Any

import jax
import numpy as np
import pytest

from relora_jax.checkpoint.saved import updates_saved
from relora_jax.errors import BAD_SETTING, STOPPED, UserError
from relora_jax.training import processes
from tests.support.commands import Sandbox

HEARTBEAT_S = 10
MICROBATCH = "--config.train.microbatch=8"  # of up to eight devices
COMMAND = {"coordinator": "host:1234", "processes": "3", "process": "2", "heartbeat": "100"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"process": ""}, "missing --process: pass"),
        ({"coordinator": "", "process": ""}, "missing --coordinator and --process: pass"),
        ({"process": "3"}, "--process=3 must be below --processes=3"),
        ({"process": "-1"}, "--process=-1 must be an integer"),
        ({"processes": "two"}, "--processes=two must be an integer"),
        ({"coordinator": "host"}, "--coordinator=host must be HOST:PORT"),
        ({"coordinator": "host:0"}, "must be HOST:PORT"),
        ({"heartbeat": "1"}, "--heartbeat=1 must be at least 3 seconds"),
    ],
)
def test_half_given_or_contradictory_flags_are_refused(flags: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        processes.start(COMMAND | flags)


def test_one_process_needs_no_others() -> None:
    alone = dict.fromkeys(COMMAND, "") | {"processes": "1", "heartbeat": "100"}
    assert processes.start(alone) is None
    assert processes.start(processes.FLAGS) is None  # nothing is detected here
    assert processes.is_writer() and processes.gather("x") == ["x"] and processes.from_writer(3) == 3
    with pytest.raises(OSError, match=r"^full$"):
        processes.together(lambda: (_ for _ in ()).throw(OSError("full")))


def test_process_with_other_facts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(text: str) -> list[str]:
        return [text, text.replace(socket.gethostname(), "b"), text.replace('"seed": 0', '"seed": 1')]

    monkeypatch.setattr(processes, "gather", gather)
    with pytest.raises(UserError, match=r"process 2 on .* differs from process 0 on .* \(seed: 0 -> 1\)"):
        processes.agree({"rows": {"a": [1]}, "seed": 0})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"), False),
        (ValueError("A: not a status"), False),
        (ValueError("shapes (3,) and (4,)"), False),
    ],
)
def test_error_that_the_death_of_another_process_may_cause(error: Exception, expected: bool) -> None:
    assert processes._may_be_a_death(error) is expected


class Job:
    """The processes of one `train` command."""

    def __init__(self, sandbox: Sandbox, count: int, workdir: str, *args: str, **last: Any) -> None:
        """`last`: arguments or environment (in capitals) of the last process alone."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        self.processes = []
        for i in range(count):
            flags = [f"--coordinator={address}", f"--processes={count}", f"--process={i}"]
            flags += [f"--heartbeat={HEARTBEAT_S}"]
            own = last if i == count - 1 else {}
            environment = {k: v for k, v in own.items() if k.isupper()}
            environment["JAX_NUM_CPU_DEVICES"] = "2"
            more = [f"--{k}={v}" for k, v in own.items() if k.islower() and k != "folder"]
            folder = own.get("folder", workdir)
            config = f"--config={sandbox.folder / 'toy.py'}"
            self.processes.append(
                sandbox.start(
                    config,
                    MICROBATCH,
                    *args,
                    *more,
                    *(flags if count > 1 else []),
                    workdir=folder,
                    **environment,
                )
            )

    def end(self) -> list[tuple[int, str, str]]:
        """(exit code, stdout, stderr) of each process."""
        outputs = [process.communicate(timeout=400) for process in self.processes]
        return [(p.returncode, *output) for p, output in zip(self.processes, outputs, strict=True)]

    def codes(self) -> list[int]:
        ended = self.end()
        self.outputs, self.errors = [out for _, out, _ in ended], [err for _, _, err in ended]
        return [code for code, _, _ in ended]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Sandbox:
    """With the run of one process with one device in "one", and that of two processes in "two"."""
    sandbox = Sandbox(tmp_path_factory.mktemp("processes"))
    config = f"--config={sandbox.folder / 'toy.py'}"
    one = sandbox.train(config, MICROBATCH, workdir="one", JAX_NUM_CPU_DEVICES="1")
    assert one.returncode == 0, one.stderr
    job = Job(sandbox, 2, "two")
    assert job.codes() == [0, 0], job.errors
    return sandbox


def close(sandbox: Sandbox, workdir: str, other: str = "one") -> None:
    """The numbers of both runs agree up to rounding."""
    rows, expected = sandbox.rows(workdir), sandbox.rows(other)
    assert len(rows) == len(expected)
    for row, one in zip(rows, expected, strict=True):
        assert row.keys() == one.keys() and row["kind"] == one["kind"]
        for key in ("loss", "perplexity", "update", "tokens_seen", "grad_norm"):
            if key in row:
                np.testing.assert_allclose(row[key], one[key], rtol=1e-5 if key != "grad_norm" else 1e-4)


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(sandbox: Sandbox) -> None:
    close(sandbox, "two")
    facts = sandbox.facts("two")
    assert (
        len(facts["devices"]) == 4
        and facts["unigram_perplexity"] == sandbox.facts("one")["unigram_perplexity"]
    )
    assert (sandbox.folder / "two" / "report.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["last", "first"])
def test_others_stop_if_a_process_dies_and_the_run_resumes_bitwise(sandbox: Sandbox, victim: str) -> None:
    workdir = f"killed_{victim}"
    if victim == "last":
        job = Job(sandbox, 2, workdir, KILL_AT=f"10 {int(signal.SIGKILL)}")
        dead = 1
    else:
        job, dead = Job(sandbox, 2, workdir), 0
        for line in job.processes[0].stdout:  # type: ignore[union-attr]
            if "update 10:" in line:
                job.processes[0].kill()
                break
    codes = job.codes()
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] == STOPPED, job.errors
    assert f"process {dead} died: run the same command again in all processes" in job.errors[1 - dead]
    assert "Traceback" not in job.errors[1 - dead] and "stack trace" not in job.errors[1 - dead]
    job = Job(sandbox, 2, workdir)
    assert job.codes() == [0, 0], job.errors
    assert sandbox.rows(workdir) == sandbox.rows("two")
    weights, expected = sandbox.weights(workdir), sandbox.weights("two")
    assert all(np.array_equal(weights[path], expected[path]) for path in expected)


@pytest.mark.slow
def test_signal_to_one_stops_all_at_the_same_update(sandbox: Sandbox) -> None:
    job = Job(sandbox, 2, "signal", KILL_AT=f"2 {int(signal.SIGTERM)}")
    assert job.codes() == [STOPPED, STOPPED], job.errors
    stopped_at = updates_saved(sandbox.folder / "signal")[-1]
    assert 2 < stopped_at < 20
    assert f"stopped and saved after update {stopped_at}:" in job.outputs[0]  # none had to be ended
    assert not any("died" in error or "after 25 s" in error for error in job.errors)
    job = Job(sandbox, 2, "signal")
    assert job.codes() == [0, 0], job.errors
    assert sandbox.rows("signal") == sandbox.rows("two")


@pytest.mark.slow
def test_run_continues_on_another_number_of_processes_and_another_mesh(sandbox: Sandbox) -> None:
    def until(count: int, *mesh: str, **last: Any) -> list[int]:
        job = Job(sandbox, count, "elastic", *(f"--config.mesh.{m}" for m in mesh), **last)
        codes = job.codes()
        assert set(codes) <= {0, STOPPED}, job.errors
        return codes

    def soon() -> str:
        return f"{updates_saved(sandbox.folder / 'elastic')[-1] + 1} {int(signal.SIGTERM)}"

    assert until(4, "fsdp=4", KILL_AT=f"3 {int(signal.SIGTERM)}") == [STOPPED] * 4
    assert until(1, "fsdp=2", KILL_AT=soon()) == [STOPPED]
    assert until(2, "fsdp=2", KILL_AT=soon()) == [STOPPED] * 2
    assert until(2, "tensor=2") == [0, 0]
    close(sandbox, "elastic")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"config.train.seed": "1"}, "train.seed: 0 -> 1"),
        ({"TFDS_DATA_DIR": "/nowhere"}, "/nowhere"),
        ({"folder": "elsewhere"}, "is not the directory of process 0"),
    ],
    ids=["config", "data", "directory"],
)
def test_process_that_differs_ends_all_with_one_line(
    sandbox: Sandbox, last: dict[str, str], message: str
) -> None:
    if "TFDS_DATA_DIR" in last:  # nor are its rows cached
        last = {**last, "XDG_CACHE_HOME": str(sandbox.folder / "other_cache")}
    job = Job(sandbox, 2, "differs", **last)
    assert job.codes() == [BAD_SETTING] * 2
    for error in job.errors:
        [line] = [line for line in error.splitlines() if line.startswith("error:")]
        assert f"process 1 on {socket.gethostname()}" in line and message in line and "Traceback" not in error
    assert not (sandbox.folder / "differs" / "config.json").exists()
    shutil.rmtree(sandbox.folder / "differs", ignore_errors=True)


@pytest.mark.slow
def test_processes_of_slurm_find_each_other_and_wait_for_the_report(sandbox: Sandbox) -> None:
    common: dict[str, Any] = {
        "SLURM_JOB_ID": str(random.randrange(4096)),  # decides the port
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "REPORT_S": str(processes.LEAVE_TIMEOUT_S + 5),
    }
    running = [
        sandbox.start(
            f"--config={sandbox.folder / 'toy.py'}",
            MICROBATCH,
            workdir="slurm",
            JAX_NUM_CPU_DEVICES="2",
            **common,
            SLURM_PROCID=str(i),
            SLURM_LOCALID=str(i),
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=400)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert sandbox.rows("slurm") == sandbox.rows("two")


@pytest.mark.slow
def test_processes_that_stand_still_write_their_stacks(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STALL_S", "5")
    job = Job(sandbox, 2, "stall", HANG_AT="15")  # the last one, for which the other waits
    files = [sandbox.folder / "stall" / f"stacks-{i}.txt" for i in range(2)]
    deadline = time.monotonic() + 200
    while not all(map(pathlib.Path.exists, files)) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(1)  # until the line is printed
    for process in job.processes:
        process.kill()
    job.codes()
    assert "in killing" in files[1].read_text() and "Thread MainThread" in files[0].read_text()
    assert job.errors[0].count("no update for") == 1 and "no update for" not in job.errors[1]


@pytest.mark.slow
def test_second_job_on_a_workdir_is_refused(sandbox: Sandbox) -> None:
    first = Job(sandbox, 2, "shared", HANG_AT="6")
    for line in first.processes[1].stdout:  # type: ignore[union-attr]
        if "hangs" in line:
            break
    second = Job(sandbox, 2, "shared")
    assert second.codes() == [BAD_SETTING] * 2
    assert all(f"in use by process {first.processes[0].pid}" in error for error in second.errors)
    for process in first.processes:
        process.kill()
    first.end()


@pytest.mark.slow
def test_evaluate_and_generate_print_once(sandbox: Sandbox, tmp_path: pathlib.Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    outputs = {}
    for command in ("evaluate", "generate"):
        running = [
            sandbox.start(
                f"--coordinator={address}",
                "--processes=2",
                f"--process={i}",
                *(["--n=2", "--temperature=0", "--prompt=the"] if command == "generate" else []),
                workdir="two",
                command=command,
                JAX_NUM_CPU_DEVICES="2",
            )
            for i in range(2)
        ]
        outputs[command] = [process.communicate(timeout=300) for process in running]
        assert [process.returncode for process in running] == [0, 0], outputs[command]
        assert not [line for line in outputs[command][1][0].splitlines() if "[Gloo]" not in line]
    last = [row for row in sandbox.rows("two") if row["kind"] == "eval"][-1]
    assert f"loss {last['loss']:.4f} nats" in outputs["evaluate"][0][0]
    assert "--- 2 of 2, update 20" in outputs["generate"][0][0]
