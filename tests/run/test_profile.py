from pathlib import Path

import jax.numpy as jnp
import pytest

from relora_jax.errors import UserError
from relora_jax.run import profile
from relora_jax.run.goodput import Clock
from relora_jax.run.profile import Profile
from relora_jax.storage.writer import Writer


@pytest.mark.parametrize("spec", ["5", "5:", ":5", "5:5", "6:5", "-1:3", "a:b", "5:11", "1:2:3"])
def test_wrong_span_is_refused(spec: str) -> None:
    with pytest.raises(UserError, match=r"must be START:STOP, two updates"):
        profile.parse(spec, updates=10)


def test_span() -> None:
    assert profile.parse("", updates=10) is None and profile.parse("0:10", updates=10) == (0, 10)


@pytest.mark.parametrize(
    ("start", "stop", "traced"),
    [
        (0, 10, [2, 3]),
        (3, 10, [3]),  # resumed inside
        (4, 10, []),
        (0, 3, [2]),  # stopped inside
    ],
)
def test_only_the_updates_of_the_span_are_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int, stop: int, traced: list[int]
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(profile.jax.profiler, "start_trace", lambda folder: calls.append(folder))
    monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: calls.append("stop"))
    seen = []
    with Profile(Writer(tmp_path), Clock(), (2, 4)) as profiler:
        for u in range(start, stop):
            profiler.before(u, jnp.array(u))
            seen += [u] if len(calls) == 1 else []
            profiler.after(u + 1, jnp.array(u))
    assert seen == traced and calls == ([str(tmp_path / "profile"), "stop"] if traced else [])


def test_profiler_that_fails_neither_ends_the_run_nor_hides_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no trace")

    with pytest.raises(KeyError), Profile(Writer(tmp_path), Clock(), (0, 9)) as profiler:
        profiler.before(0, jnp.array(0))
        stop = profile.jax.profiler.stop_trace
        monkeypatch.setattr(profile.jax.profiler, "stop_trace", lambda: (stop(), fail()))
        raise KeyError
    monkeypatch.setattr(profile.jax.profiler, "start_trace", fail)
    with Profile(Writer(tmp_path), Clock(), (0, 9)) as profiler:
        profiler.before(0, jnp.array(0))
        profiler.before(1, jnp.array(1))
    assert capsys.readouterr().err == 2 * "warning: there is no trace of the profiler: no trace\n"


def test_no_update_outside_of_the_span_is_waited_for(tmp_path: Path) -> None:
    class Never:
        def block_until_ready(self) -> None:
            raise AssertionError("waits")

    with Profile(Writer(tmp_path), Clock(), (2, 4)) as profiler:
        for u in (0, 1, 4, 5):
            profiler.before(u, Never())
            profiler.after(u + 1, Never())


def test_trace_is_what_xprof_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Profile(Writer(tmp_path), Clock(), (0, 1)) as profiler:
        profiler.before(0, jnp.array(0))
        profiler.after(1, jnp.arange(4.0) * 2)
    with Profile(Writer(tmp_path / "second", active=False), Clock(), (0, 1)) as profiler:
        profiler.before(0, jnp.array(0))
    [trace] = (tmp_path / "profile").glob("plugins/profile/*/*.xplane.pb")
    assert trace.stat().st_size > 0 and not (tmp_path / "second").exists()
    assert capsys.readouterr().out == (
        f"trace of the profiler in {tmp_path}/profile: open it with xprof or TensorBoard\n"
    )
