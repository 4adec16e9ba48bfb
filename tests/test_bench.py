import json

import pytest

from relora_jax import bench
from relora_jax.benchmark.column import Column
from relora_jax.errors import UserError
from relora_jax.planning.chips import CHIPS
from relora_jax.planning.compiled import Memory
from relora_jax.planning.topology import Topology
from tests.support.commands import TOY

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # from ml_collections


class Fake:
    """A runner without programs: the n-th update of all takes n seconds."""

    compiled_bytes, peak_bytes, runners, updates = 1e6, None, [], 0

    def __init__(self, name, config):
        self.name, self.config = name, config
        Fake.runners.append(self)

    def start(self):
        pass

    def step(self):
        Fake.updates += 1
        return float(Fake.updates)

    def column(self, step_s):
        return Column(self.name, self.config, 1e9, step_s, restart_s=0.5, compiled_bytes=self.compiled_bytes)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "enable_compilation_cache", lambda: None)  # the suite has its own
    monkeypatch.setattr(bench.measured, "Ours", Fake)
    Fake.runners, Fake.updates = [], 0
    (tmp_path / "toy.py").write_text(TOY)
    return f"--config={tmp_path}/toy.py"


def test_json_has_a_column_for_each_arm_and_product(toy, tmp_path, capsys):
    args = [toy, "--product=separate,fused", "--rounds=2", "--json", "--config.relora.dropout=0.1"]
    assert bench.main(["bench", *args, "--microbatch=16", f"--picture={tmp_path}/a.png"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = [column["name"] for column in facts["columns"]]
    assert names == ["full", "relora separate", "relora fused"]
    assert facts["rows"] == 16 and facts["compiled"] is False and "--rounds=2" in facts["command"]
    assert {"jax", "flax"} <= facts["versions"].keys() and facts["device"] == "8 x cpu"
    assert [column["step_s"] for column in facts["columns"]] == [[1, 4], [2, 5], [3, 6]]
    assert [column["step_to_first"] for column in facts["columns"]] == [1, (2 + 5 / 4) / 2, (3 + 6 / 4) / 2]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_compiled_columns_say_and_draw_their_causes(toy, tmp_path, capsys, monkeypatch):
    def column(name, config, *_):
        causes, memory = {"matrix products": 0.3, "norm": 0.1}, Memory(1e9, 2e9, 3e9, 4e9)
        return Column(name, config, 1e9, (0.4,), causes_s=causes, memory=memory, compiled_bytes=memory.total)

    topology = Topology("h100:1", CHIPS["h100"], [None], 1)
    monkeypatch.setattr(bench, "make_topology", lambda name: topology)
    monkeypatch.setattr(bench.expected, "column", column)
    args = [toy, "--topology=h100:1", "--json", f"--picture={tmp_path}/a.png"]
    assert bench.main(["bench", *args]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["compiled"] is True
    full, relora = facts["columns"]
    assert full["causes_s"] == relora["causes_s"] == {"matrix products": 0.3, "norm": 0.1}
    assert relora["memory"] == {"weights": 1e9, "moments": 2e9, "gradients": 3e9, "temporaries": 4e9}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_update_is_one_microbatch_in_the_phase_of_its_arm(toy, capsys):
    assert bench.main(["bench", toy, "--product=separate,fused", "--config.relora.dropout=0.1"]) == 0
    full, separate, fused = (runner.config for runner in Fake.runners)
    assert {(c.train.batch, c.train.microbatch, c.low_rank_start) for c in (separate, fused)} == {(8, 8, 0)}
    assert full.low_rank_start == full.train.updates and full.train.batch == 8
    assert (separate.relora.product, separate.relora.dropout) == ("separate", 0.1)
    assert (fused.relora.product, fused.relora.dropout) == ("fused", 0.0)
    title, header, *_ = capsys.readouterr().out.splitlines()
    assert title == "small on 8 x cpu: an update is 8 rows of 12, 10 of each, alternately"
    assert header.split() == ["full", "relora", "separate", "relora", "fused"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--arms="], "--arms is empty"),
        (["--product=both"], "relora.product"),
        (["--microbatch=0"], "--microbatch=0 must be an integer of at least 1"),
        (["--rounds=few"], "--rounds=few"),
        (["--picture=missing/a.png"], "the directory missing does not exist"),
        (["--topology=a100:1"], "unknown topology"),
        (["--peer=tf"], "--peer=tf is not known"),
        (["--peer=torch", "--topology=h100:1"], "is run, not compiled"),
        (["--peer=torch"], "--peer=torch "),
    ],
)
def test_mistake_is_reported_before_anything_is_compiled(toy, args, message):
    with pytest.raises(UserError, match=message):
        bench.main(["bench", toy, *args])
    assert not Fake.runners
