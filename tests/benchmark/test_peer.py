"""What PyTorch's process is sent and answers; with the extra bench or hf-test, what it computes."""

import math
import sys
from typing import Any

import jax
import numpy as np
import pytest

from relora_jax import shapes
from relora_jax.benchmark import measured, peer, torch_peer
from relora_jax.benchmark.measured import synthetic_ids
from relora_jax.errors import UserError
from tests.support import small

# answers as torch_peer does: the n-th update takes n seconds
CHILD = """
import json, sys
settings = json.loads(sys.stdin.readline())
print(json.dumps({"versions": settings["optimizer"], "threads": 2}), flush=True)
for n, line in enumerate(sys.stdin, 1):
    print(json.dumps({"seconds": n, "peak_bytes": 7}), flush=True)
"""


def test_times_are_those_that_the_process_answers(monkeypatch) -> None:
    monkeypatch.setattr(peer, "COMMAND", [sys.executable, "-c", CHILD])
    runner = peer.TorchPeer("torch full", small.config("full"))
    [column] = measured.alternate([runner], rounds=3)
    assert column.step_s == (1, 2, 3) and column.peak_bytes == 7 and column.compiled_bytes is None
    assert runner.facts["versions"]["lr"] == measured.LEARNING_RATE
    assert runner._process is not None and runner._process.returncode == 0


def test_process_that_dies_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr(
        peer, "COMMAND", [sys.executable, "-c", "import sys; sys.stdin.readline(); sys.exit(9)"]
    )
    with pytest.raises(UserError, match="torch full: PyTorch ended with code 9"):
        peer.TorchPeer("torch full", small.config("full")).start()


def test_only_what_pytorch_computes_alike_is_accepted(monkeypatch) -> None:
    monkeypatch.setattr(peer, "MODULES", ("json", "no_torch"))
    with pytest.raises(UserError, match=r"needs no_torch .*relora-jax\[bench\]"):
        peer.check(small.config())
    monkeypatch.setattr(peer, "MODULES", ())
    with pytest.raises(UserError, match="no separate documents"):
        peer.check(small.config(data__attend_across_documents=False))
    with pytest.raises(UserError, match="one device, not 8"):
        peer.check(small.config())
    monkeypatch.setattr(jax, "devices", lambda: [None])
    peer.check(small.config())
    with pytest.raises(UserError, match=r"no relora\.base_dtype int8: set it to float32 or bfloat16"):
        peer.check(small.config(relora__base_dtype="int8"))
    peer.check(small.config("full", relora__base_dtype="int8"))


def test_pytorch_recomputes_only_where_the_run_is_set_to() -> None:
    recomputes = {
        remat: peer.settings(small.config(model__remat=remat))["recompute"]
        for remat in ("auto", "none", "dots", "full")
    }
    assert recomputes == {"auto": False, "none": False, "dots": True, "full": True}


def test_low_rank_arm_has_the_factors_of_the_run() -> None:
    assert peer.settings(small.config("full"))["lora"] == {}
    lora = peer.settings(small.config(relora__targets=("attention", "down"), relora__dropout=0.1))["lora"]
    assert lora["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (3, 6.0, 0.1)


@pytest.mark.slow
@pytest.mark.hf
@pytest.mark.filterwarnings("ignore::FutureWarning")  # from transformers, called by PEFT
@pytest.mark.parametrize("arm", ["full", "relora"])
def test_pytorch_trains_the_same_parameters_and_its_loss_falls(arm: str, tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra hf-test")
    config = small.config(arm)
    rows = synthetic_ids(vocab_size=61, rows=8, length=small.LENGTH)
    np.save(tmp_path / "ids.npy", rows)
    settings: dict[str, Any] = peer.settings(config) | {"ids": str(tmp_path / "ids.npy")}
    settings["optimizer"]["lr"] = 1e-2
    counts = {True: 0, False: 0}
    for parameter in torch_peer.make_model(settings).parameters():
        counts[parameter.requires_grad] += parameter.numel()
    assert counts == {True: shapes.count(config).trained, False: shapes.count(config).frozen}
    update = torch_peer.prepared_update(settings, torch.device("cpu"))
    losses = [update() for _ in range(30)]
    assert losses[0] == pytest.approx(math.log(61), abs=0.1) and losses[-1] < losses[0] - 0.5
