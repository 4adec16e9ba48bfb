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
    "args",
    [
        ["--text=*.gz", "--text_field=content"],
        ["--text", "*.gz", "-text_field=content"],
        ["--config.data.text=*.gz", "--config.data.text_field=content"],
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_text_flags_are_shorthands_for_their_settings(file, args, before):
    line = [*args, f"--config={file}:full"] if before else [f"--config={file}:full", *args]
    if before and args[0].startswith("--config"):
        line = [line[-1], *line[:-1]]
    config, strings = cli.parse(["train", *line, "--workdir=w"], workdir="")
    assert (config.arm, config.data.text, config.data.text_field) == ("full", "*.gz", "content")
    assert strings == {"workdir": "w"}


@pytest.mark.parametrize("form", ["--config={}", "--config {}"])
def test_command_for_another_module_has_only_the_settings(file, form):
    line = form.format(shlex.quote(file)) + " --workdir=w --config.relora.rank 2 --config.relora.jagged=false"
    line += " --text '*.gz'"
    command = cli.command("prepare", ["train", *shlex.split(line)])
    *python, module = shlex.split(command)[:3]
    assert (python, module) == (["python", "-m"], "relora_jax.prepare")
    config, _ = cli.parse(["prepare", *shlex.split(command)[3:]])
    assert (config.relora.rank, config.relora.jagged, config.data.text) == (2, False, "*.gz")
    assert "workdir" not in command


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "fix the disk or the data"),
        (OSError(errno.EMFILE, "Too many open files"), "raise the limit on open files (ulimit -n)"),
        (OSError("a: open() failed: Too many open files"), "raise the limit on open files"),
    ],
)
def test_os_error_exits_with_74_and_a_remedy(error, remedy, capsys):
    def run(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(run, None, ["a"])
    assert stop.value.code == 74 and f": {remedy}" in (line := capsys.readouterr().err)
    assert line.endswith(", then run the same command again\n") and line.count("\n") == 1
