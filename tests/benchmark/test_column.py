import pytest

from relora_jax.benchmark import table
from relora_jax.benchmark.column import Column
from tests.support import small

PEAK = 1e9


def column(*step_s: float, arm: str = "relora", **fields) -> Column:
    return Column(arm, small.config(arm), PEAK, step_s, **fields)


def test_ratio_is_the_median_of_the_rounds_not_the_ratio_of_medians() -> None:
    # the machine is slower in each round than in the one before
    first, second = column(1.0, 2.0, 4.0), column(1.5, 3.2, 4.4)
    assert second.ratio(first) == pytest.approx(1.5)
    assert first.ratio(first) == 1.0


def test_mfu_is_the_share_of_the_peak_that_the_model_needs() -> None:
    # 2 layers of 16 x 24, 4 heads of 4 and 2 for keys and values, 61 ids, rows of 12; 6 FLOPs a weight
    kernels, head, attention = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24), 16 * 61, 12 * 2 * 12 * 16
    flops = 6 * (kernels + head) + attention
    full = column(0.5, 0.1, 0.2, arm="full")
    assert full.flops_per_token == flops
    assert full.tokens_per_s == 8 * 12 / 0.2
    assert full.mfu == pytest.approx(flops * 8 * 12 / 0.2 / PEAK)
    factors = 2 * 3 * (2 * 32 + 2 * 24 + 3 * 40)  # of rank 3
    assert column(0.2).flops_per_token == 4 * kernels + 6 * (factors + head) + attention
    assert Column("cpu", small.config("full"), None, (0.2,)).mfu is None


def test_restart_share_is_of_a_cycle_of_updates() -> None:
    assert column(0.2, restart_s=0.4).restart_share == pytest.approx(0.4 / (4 * 0.2))  # cycles of 4
    assert column(0.2).restart_share is None


def test_table_says_what_is_not_known() -> None:
    columns = [
        Column("full", small.config("full"), None, (0.2, 0.2), compiled_bytes=2e9),
        Column(
            "relora",
            small.config(),
            None,
            (0.1, 0.1),
            restart_s=0.004,
            compiled_bytes=1e9,
            peak_bytes=1.5e9,
        ),
    ]
    measured = {label: cells for label, *cells in table.rows(columns, compiled=False)}
    assert measured[""] == ["full", "relora"]
    assert measured["MFU"] == ["-", "-"]
    assert measured["step, to full"] == ["1.000", "0.500"]
    assert measured["peak memory, measured"] == ["-", "1.50 GB"]
    assert measured["memory, to full"] == ["1.000", "0.500"]
    assert measured["restart"] == ["-", "4.0 ms"] and measured["restart, of a cycle"] == ["-", "1.0%"]
    compiled = [label for label, *_ in table.rows(columns, compiled=True)]
    assert "step, roofline of the compiled kernels" in compiled and "MFU, at most" in compiled
    assert not any(label.startswith(" ") for label in compiled)
    assert not any("measured" in label or "median" in label for label in compiled)


def test_causes_of_a_compiled_step_stand_below_it_without_those_of_nothing() -> None:
    causes = {"matrix products": 0.1, "norm": 0.02, "rope": 0.0}
    columns = [Column("full", small.config("full"), None, (0.12,), causes_s=causes)]
    rows = dict(table.rows(columns, compiled=True)[1:4])
    assert rows.pop("step, roofline of the compiled kernels") == "120 ms"
    assert rows == {"  matrix products": "100 ms", "  norm": "20.0 ms"}
