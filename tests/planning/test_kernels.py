"""Bytes and FLOPs of kernels, from HLO as XLA writes it, against values computed by hand."""

import pytest

from relora_jax.planning import kernels
from relora_jax.planning.chips import CHIPS

CHIP = CHIPS["h100"]._replace(matmul_flops_per_s=1e6, memory_bytes_per_s=1e3)
# 10 layers [8, 4] in a loop of 10: one is read, multiplied by x [4, 4], and put into a stack of results.
LOOP = """HloModule m, is_scheduled=true

%slice_of (p0: f32[10,8,4], p1: s32[]) -> bf16[8,4] {
  %p0 = f32[10,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %wide = f32[10,8,4]{2,1,0} convert(%p0)
  %ds = f32[1,8,4]{2,1,0} dynamic-slice(%wide, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  %cast = f32[8,4]{1,0} bitcast(%ds)
  ROOT %half = bf16[8,4]{1,0} convert(%cast)
}

%into (p0: f32[10,8,4], p1: f32[8,4], p2: s32[]) -> f32[10,8,4] {
  %p0 = f32[10,8,4]{2,1,0} parameter(0)
  %p1 = f32[8,4]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = f32[1,8,4]{2,1,0} bitcast(%p1)
  ROOT %dus = f32[10,8,4]{2,1,0} dynamic-update-slice(%p0, %one, %p2, %zero, %zero)
}

%gemm (p0: bf16[8,4], p1: bf16[4,4]) -> f32[8,4] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = bf16[4,4]{1,0} parameter(1)
  ROOT %dot = f32[8,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[10,8,4], f32[10,8,4], bf16[4,4])) -> (s32[], f32[10,8,4], f32[10,8,4], bf16[4,4]) {
  %s = (s32[], f32[10,8,4], f32[10,8,4], bf16[4,4]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %stack = f32[10,8,4]{2,1,0} get-tuple-element(%s), index=1
  %out = f32[10,8,4]{2,1,0} get-tuple-element(%s), index=2
  %x = bf16[4,4]{1,0} get-tuple-element(%s), index=3
  %layer = bf16[8,4]{1,0} fusion(%stack, %i), kind=kLoop, calls=%slice_of
  %y = f32[8,4]{1,0} fusion(%layer, %x), kind=kCustom, calls=%gemm
  %put = f32[10,8,4]{2,1,0} fusion(%out, %y, %i), kind=kLoop, calls=%into
  ROOT %t = (s32[], f32[10,8,4], f32[10,8,4], bf16[4,4]) tuple(%i, %stack, %put, %x)
}

ENTRY %main () -> f32[] {
  %init = (s32[], f32[10,8,4], f32[10,8,4], bf16[4,4]) parameter(0)
  %w = (s32[], f32[10,8,4], f32[10,8,4], bf16[4,4]) while(%init), condition=%c, body=%body, \
backend_config={"known_trip_count":{"n":"10"}}
}
"""


def test_loop_over_stacked_layers_moves_a_layer_at_a_time() -> None:
    by_name = {kernel.name: kernel for kernel in kernels.kernels(LOOP)}
    assert by_name.keys() == {"layer", "y", "put"}
    index = 4
    assert by_name["layer"][:3] == ("layer", 0, 10 * (8 * 4 * 4 + index + 8 * 4 * 2))
    assert by_name["y"][:3] == ("y", 10 * 2 * 8 * 4 * 4, 10 * (8 * 4 * 2 + 4 * 4 * 2 + 8 * 4 * 4))
    assert by_name["put"][:3] == ("put", 0, 10 * (8 * 4 * 4 + index + 8 * 4 * 4))


def test_roofline_adds_the_slower_of_product_and_memory_of_each_kernel() -> None:
    both = [kernels.Kernel("a", 2e6, 500.0), kernels.Kernel("b", 1e6, 4e3), kernels.Kernel("c", 0.0, 1e3)]
    assert kernels.roofline_s(both, CHIP) == 2 + 4 + 1
    assert kernels.roofline_s(both, CHIP) > max(3e6 / 1e6, 5.5e3 / 1e3)  # of the sums


# {instruction: the bytes that it reads and writes}
@pytest.mark.parametrize(
    ("instruction", "moved"),
    [
        ("f32[64,8] add(%x, %x)", 2 * 64 * 8 * 4),  # one array, read once
        ("f32[64,8] copy(%x)", 2 * 64 * 8 * 4),
        ("f32[8,64] bitcast(%x)", 0),
        ("(f32[64,8], s32[]) tuple(%x, %i)", 0),
        ("f32[2,8] dynamic-slice(%x, %i, %i), dynamic_slice_sizes={2,8}", 2 * 2 * 8 * 4 + 4),
        ("f32[3,8] gather(%x, %ids), offset_dims={1}", 2 * 3 * 8 * 4 + 3 * 4),
        ("f32[64,8] dynamic-update-slice(%x, %u, %i, %i)", 2 * 3 * 8 * 4 + 4),
        ("f32[64,8] scatter(%x, %ids, %u), update_window_dims={1}", 3 * 3 * 8 * 4 + 3 * 4),  # added to
        ("f32[128,8] all-gather(%x), replica_groups={{0,1}}", 0),
        ("(f32[64,8], s8[4096]) custom-call(%x, %u), custom_call_target=\"__cublas$lt$matmul\"", 131 * 8 * 4),
        ("(f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]) copy-start(%x)", 64 * 8 * 4),  # to a TPU's own
        ("f32[64,8]{1,0} copy-done(%x)", 0),
        ("f32[64,8]{1,0:T(8,128)S(1)} negate(%x)", 64 * 8 * 4),
    ],
)  # fmt: skip
def test_bytes_of_a_kernel(instruction: str, moved: float) -> None:
    text = "\n".join(
        [
            "HloModule m\n\nENTRY %main () -> f32[] {",
            "  %x = f32[64,8]{1,0} parameter(0)",
            "  %u = f32[3,8]{1,0} parameter(1)",
            "  %ids = s32[3]{0} parameter(2)",
            "  %i = s32[] parameter(3)",
            f"  ROOT %y = {instruction}\n}}\n",
        ]
    )
    assert sum(kernel.bytes for kernel in kernels.kernels(text)) == moved


def test_fusion_within_a_fusion_reads_its_part() -> None:
    text = LOOP.replace(
        "ENTRY %main",
        "%outer (p0: f32[10,8,4], p1: s32[]) -> (bf16[8,4], f32[10,8,4]) {\n"
        "  %p0 = f32[10,8,4]{2,1,0} parameter(0)\n  %p1 = s32[] parameter(1)\n"
        "  %inner = bf16[8,4]{1,0} fusion(%p0, %p1), kind=kLoop, calls=%slice_of\n"
        "  %out = f32[10,8,4]{2,1,0} broadcast(%p1), dimensions={}\n"
        "  ROOT %both = (bf16[8,4], f32[10,8,4]) tuple(%inner, %out)\n}\n\nENTRY %main",
    ).replace(
        "  %w = (",
        "  %stack = f32[10,8,4]{2,1,0} parameter(1)\n  %k = s32[] parameter(2)\n"
        "  %nested = (bf16[8,4], f32[10,8,4]) fusion(%stack, %k), kind=kLoop, calls=%outer\n  %w = (",
    )
    by_name = {kernel.name: kernel for kernel in kernels.kernels(text)}
    assert by_name["nested"].bytes == 8 * 4 * 4 + 4 + 8 * 4 * 2 + 10 * 8 * 4 * 4


@pytest.mark.parametrize(
    ("types", "rate"), [(("s8", "s8"), 2), (("f8e4m3fn", "f8e4m3fn"), 1), (("bf16", "s8"), 1)]
)
def test_products_of_8_bit_types_that_a_chip_multiplies_take_half_the_time(
    types: tuple[str, str], rate: int
) -> None:
    left, right = types
    text = LOOP.replace("p0: bf16[8,4], p1: bf16[4,4]) -> f32", "p0: x, p1: y) -> f32")
    text = text.replace("%p0 = bf16[8,4]{1,0} parameter(0)", f"%p0 = {left}[8,4]{{1,0}} parameter(0)")
    text = text.replace("%p1 = bf16[4,4]{1,0} parameter(1)", f"%p1 = {right}[4,4]{{1,0}} parameter(1)")
    (product,) = [kernel for kernel in kernels.kernels(text) if kernel.flops]
    chip = CHIP._replace(memory_bytes_per_s=1e9, eight_bit_types=("s8",))
    assert product.seconds(chip) == pytest.approx(10 * 2 * 8 * 4 * 4 / 1e6 / rate)
