"""Every known mistake is noticed by a test."""

import pytest

from tests import mutants


@pytest.mark.slow
def test_no_mutant_survives(capfd: pytest.CaptureFixture[str]) -> None:
    survived = mutants.main("")
    printed = capfd.readouterr().out
    assert survived == 0, printed
    assert printed.strip().splitlines()[-1] == f"{len(mutants.MUTANTS)} mutants, 0 survived"
    assert len(mutants.MUTANTS) >= 12


def test_every_mutant_still_applies() -> None:
    for mutant in mutants.MUTANTS:
        code = (mutants.ROOT / "relora_jax" / mutant.file).read_text()
        assert code.count(mutant.old) == 1, mutant.mistake
