import re

import pytest

from relora_jax import bench
from relora_jax.data import batches


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # from ml_collections
def test_input_reads_the_rows_twice_and_prints_both_speeds(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "c.py").write_text(
        "import pathlib\nfrom tests.support import own_text, small\n"
        "def get_config(arm='relora'):\n    config = small.config(train__batch=16, train__microbatch=8)\n"
        f"    config.data = own_text.config(pathlib.Path({str(folder)!r}))\n    return config\n"
    )
    read, train_batch = [], batches.train_batch
    spy = lambda store, u, **shape: read.append(u) or train_batch(store, u, **shape)  # noqa: E731
    monkeypatch.setattr(batches, "train_batch", spy)
    assert bench.main(["bench", "--input", f"--config={tmp_path}/c.py"]) == 0
    out = capsys.readouterr().out
    (cold, cold_tokens), (warm, warm_tokens) = (
        [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:rows|tokens)/s", line)]
        for line in out.splitlines()
    )
    assert out.startswith("cold: ") and "\nwarm: " in out
    assert min(cold, warm) > 0 and cold_tokens == pytest.approx(20 * cold, abs=20) and warm_tokens > 10 * warm
    epoch = len(read) // 2
    assert read == [*range(epoch), *range(epoch)] and epoch == 8
    with pytest.raises(ValueError, match="--seconds=soon is not a number"):
        bench.main(["bench", "--input", f"--config={tmp_path}/c.py", "--seconds=soon"])
