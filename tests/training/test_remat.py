"""model.remat=auto is the fastest policy whose updates fit."""

from typing import Any

import jax
import pytest

from relora_jax.training import remat
from relora_jax.training.program import Program
from tests.support import small


class Lowered:
    """A program that needs this many bytes, or is refused."""

    def __init__(self, needs: int, *, text: str = "", error: str = "") -> None:
        self.argument_size_in_bytes, self.output_size_in_bytes, self.alias_size_in_bytes = 60, 50, 50
        self.temp_size_in_bytes, self.generated_code_size_in_bytes = needs - 61, 1
        self.text, self.error = text, error

    def compile(self) -> Any:
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        return self

    def memory_analysis(self) -> Any:
        return self

    def as_text(self) -> str:
        return self.text


def test_program_fits_if_it_needs_no_more_than_the_limit_and_recomputes_nothing() -> None:
    assert remat.fits(Lowered(100), 100)
    assert not remat.fits(Lowered(101), 100)
    assert not remat.fits(Lowered(100, text="%dot.2.remat = "), 100)
    assert not remat.fits(Lowered(0, error="RESOURCE_EXHAUSTED: out of memory"), 100)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        remat.fits(Lowered(0, error="INTERNAL: a bug"), 100)


def test_program_fits_only_if_it_does_on_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remat.processes, "gather", lambda text: [text, "no"])
    assert not remat.fits(Lowered(100), 100)


@pytest.mark.parametrize(
    ("fitting", "expected", "tried"),
    [
        ({"dots", "full"}, "dots", ["dots"]),
        ({"full"}, "full", ["dots"]),
        (set(), "full", ["dots"]),
    ],
)
def test_first_policy_that_fits_is_chosen(fitting: set[str], expected: str, tried: list[str]) -> None:
    asked: list[str] = []
    assert remat.chosen(lambda policy: asked.append(policy) or policy in fitting) == expected
    assert asked == tried


def test_devices_that_do_not_say_their_memory_have_one_candidate() -> None:
    assert remat.candidates("cpu", 0) == ("none",)
    assert remat.candidates("gpu", 0) == ("dots",)
    assert remat.candidates("gpu", 1) == remat.candidates("cpu", 1) == ("dots", "full")


def test_device_that_does_not_say_its_memory_keeps_all_without_compiling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remat, "fits", lambda *_: pytest.fail("compiled"))
    program = Program(small.config(model__remat="auto"), small.mesh())
    assert program.remat_policy(program.full_rank) == program.remat_policy(program.low_rank) == "none"


def update_with(policy: str) -> tuple[Program, Any]:
    """(program, its lowered full-rank update)."""
    config = small.config(model__remat=policy, model__layers=8, data__sequence_length=64)
    program = Program(config, small.mesh())
    return program, program.lower("full_rank_update")


@pytest.mark.slow
@pytest.mark.parametrize("policy", remat.POLICIES)
def test_auto_is_the_program_of_the_policy_that_just_fits(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = update_with(policy)
    needs = remat.used_bytes(expected.compile())
    monkeypatch.setattr(remat, "limit_bytes", lambda mesh: needs)
    program, lowered = update_with("auto")
    assert program.remat_policy(program.full_rank) == policy
    assert lowered.as_text() == expected.as_text()
