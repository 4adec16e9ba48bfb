import errno
import shlex

import pytest

from relora_jax import cli

CONFIG = "from tests.support import small\n\ndef get_config(arm='relora'):\n    return small.config(arm)\n"


@pytest.fixture
def file(tmp_path):
    (tmp_path / "c d.py").write_text(CONFIG)
    return str(tmp_path / "c d.py")


@pytest.mark.parametrize(
    "words",
    [
        ["--text=*.gz", "--text_field=content"],
        ["--text", "*.gz", "-text_field=content"],
        ["--config.data.text=*.gz", "--config.data.text_field=content"],
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_text_and_its_field_are_short_for_their_settings(file, words, before):
    line = [*words, f"--config={file}:full"] if before else [f"--config={file}:full", *words]
    if before and words[0].startswith("--config"):
        line = [line[-1], *line[:-1]]
    config, strings = cli.parse(["train", *line, "--workdir=w"], workdir="")
    assert (config.arm, config.data.text, config.data.text_field) == ("full", "*.gz", "content")
    assert strings == {"workdir": "w"}


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_command_for_another_module_has_the_settings_and_nothing_else(file, form):
    words = (
        form.format(shlex.quote(file)) + " --workdir=w --config.relora.rank 2 --config.relora.jagged=false"
    )
    words += " --text '*.gz'"
    command = cli.command("prepare", ["train", *shlex.split(words)])
    *python, module = shlex.split(command)[:3]
    assert (python, module) == (["python", "-m"], "relora_jax.prepare")
    config, _ = cli.parse(["prepare", *shlex.split(command)[3:]])
    assert (config.relora.rank, config.relora.jagged, config.data.text) == (2, False, "*.gz")
    assert "workdir" not in command


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "mend the disk or the data"),
        (OSError(errno.EMFILE, "Too many open files"), "raise the limit of open files (ulimit -n)"),
        (
            OSError("a: open() failed: Too many open files"),
            "raise the limit of open files",
        ),
    ],
)
def test_error_of_the_system_ends_with_74_and_its_remedy(error, said, capsys):
    def run(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(run, None, ["a"])
    assert stop.value.code == 74 and f": {said}" in (line := capsys.readouterr().err)
    assert line.endswith(", and the same command goes on\n") and line.count("\n") == 1
