from types import SimpleNamespace

import jax
import pytest

from relora_jax import loop, shapes
from relora_jax.planning import chips
from tests.support import small


def test_train_row_has_what_the_devices_could_do_in_its_phase(monkeypatch) -> None:
    config, chip, mesh = small.config("relora"), chips.CHIPS["v5e"], small.mesh(data=4)
    unknown = {"peak_tokens_per_s": None, "peak_bytes": None}
    assert loop.hardware(config, mesh, 4) == unknown  # a CPU says neither
    device = SimpleNamespace(memory_stats=lambda: {"peak_bytes_in_use": 5})
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(chips, "of_device", lambda device: chip)
    for u in (4, 5):  # the last update of the warm start, and the first after it
        flops = shapes.matmul_flops_per_token(config, low_rank=u == 5)
        peak = pytest.approx(4 * chip.matmul_flops_per_s / flops)
        assert loop.hardware(config, mesh, u) == {"peak_tokens_per_s": peak, "peak_bytes": 5}
