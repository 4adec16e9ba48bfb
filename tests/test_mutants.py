"""A test catches every known mistake."""

import pytest

from tests import mutants


@pytest.mark.slow
def test_every_mutant_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    survived = mutants.main(mutants.MUTANTS)
    output = capfd.readouterr().out
    assert survived == 0, output
    assert output.strip().splitlines()[-1] == f"{len(mutants.MUTANTS)} mutants, 0 survived"
    assert len(mutants.MUTANTS) >= 12


@pytest.mark.slow
@pytest.mark.ci
def test_first_mutant_of_each_room_is_killed(capfd: pytest.CaptureFixture[str]) -> None:
    chosen = mutants.of_each_room()
    rooms = {init.parent.name for init in (mutants.ROOT / "relora_jax").glob("*/__init__.py")}
    assert {mutant.file.partition("/")[0] for mutant in chosen} == rooms
    assert mutants.main(chosen) == 0, capfd.readouterr().out


def test_every_mutant_still_applies() -> None:
    for mutant in mutants.MUTANTS:
        code = (mutants.ROOT / "relora_jax" / mutant.file).read_text()
        assert code.count(mutant.old) == 1, mutant.mistake
