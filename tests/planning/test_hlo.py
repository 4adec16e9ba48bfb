"""Costs from the text of HLO: samples as XLA writes them for TPUs, GPUs and CPUs."""

import pytest

from relora_jax.planning import hlo

LOOPS = """HloModule m, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%body_inner (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %a = f32[8,16]{1,0:T(8,128)S(1)} parameter(0)
  %b = f32[16,32]{1,0} constant({...})
  %dot.1 = f32[8,32]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %ar = f32[8,32]{1,0} all-reduce(%dot.1), channel_id=7, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,16]) tuple(%i, %a)
}

%condition_inner (p: (s32[], f32[8,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %p = (s32[], f32[8,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%body_outer (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %one = s32[] constant(1)
  %copy = s32[]{:T(128)S(6)} copy(%one)
  %init = (s32[], f32[8,16]) tuple(%copy, %a)
  %w = (s32[], /*index=1*/f32[8,16]{1,0}) while(%init), condition=%condition_inner, body=%body_inner
  ROOT %fused = f32[8,16] fusion(%w), kind=kOutput, calls=%fusion_1
}

%fusion_1 (a: f32[8,16]) -> f32[8,8] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %dot.2.remat = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

ENTRY %main () -> f32[] {
  %init = (s32[], f32[8,16]) tuple(%zero, %x)
  %loop = (s32[], f32[8,16]) while(%init), condition=%c, body=%body_outer, TRIPS
}
""".replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')


def module(*instructions: str, name: str = "main") -> str:
    lines = "\n".join(f"  {instruction}" for instruction in instructions)
    return f"HloModule m\n\nENTRY %{name} () -> f32[] {{\n{lines}\n}}\n"


def test_costs_of_loops_count_as_often_as_they_run() -> None:
    costs = hlo.costs(LOOPS, slice_size=4)
    inner, outer = 2 * 8 * 32 * 16, 2 * 8 * 8 * 16
    assert costs.matmul_flops == 3 * 5 * inner + 3 * outer
    assert costs.recomputed_flops == 3 * outer
    assert costs.bytes_by_kind(between=False) == {"all-reduce": 3 * 5 * 2 * (3 / 4) * 8 * 32 * 4}


@pytest.mark.parametrize(
    ("steps", "trips"),
    [
        (["%next = s32[] add(%i, %one)"], 5),
        (["%once = s32[] add(%i, %one)", "%next = s32[] add(%once, %two)"], 2),
    ],
)
def test_unrolled_loop_runs_less_often(steps: list[str], trips: int) -> None:
    # as TPUs write products whose kernel is gathered meanwhile
    counter = [
        "%one = s32[] constant(1)",
        "%two = s32[] constant(2)",
        *steps,
        "ROOT %t = (s32[]) tuple(%next)",
    ]
    text = LOOPS.replace("ROOT %t = (s32[], f32[8,16]) tuple(%i, %a)", "\n  ".join(counter))
    inner, outer = 2 * 8 * 32 * 16, 2 * 8 * 8 * 16
    assert hlo.costs(text, slice_size=4).matmul_flops == 3 * trips * inner + 3 * outer


def test_batched_product_as_convolution_counts_as_dot() -> None:
    # q k^T of 30 rows and 8 heads, as TPUs write it: batch dimensions are spatial ones, dilated
    text = module(
        "%q = bf16[30,256,8,64]{1,3,2,0:T(8,128)(2,1)} parameter(0)",
        "%k = bf16[30,256,8,64]{1,3,2,0:T(8,128)(2,1)} parameter(1)",
        "ROOT %c = f32[30,8,256,256]{2,3,1,0:T(8,128)} convolution(%q, %k), "
        "window={size=30x8 stride=29x7 lhs_dilate=30x8}, dim_labels=0b1f_0o1i->01bf",
    )
    assert hlo.costs(text, slice_size=1).matmul_flops == 2 * 30 * 8 * 256 * 256 * 64


def test_convolution_skips_padding() -> None:
    # x @ W into 8 heads: the kernel slides over a padded axis of size 1, and meets it once for each head
    text = module(
        "%x = bf16[30,256,512,1]{1,2,3,0} parameter(0)",
        "%w = bf16[8,64,512,1]{2,1,0,3} parameter(1)",
        "ROOT %c = bf16[30,256,8,64]{1,3,2,0} convolution(%x, %w), "
        "window={size=1x8 pad=0_0x7_7 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
    )
    assert hlo.costs(text, slice_size=1).matmul_flops == 2 * 30 * 256 * 512 * 8 * 64


@pytest.mark.parametrize(("kernel", "products"), [("fwd", 2), ("dq", 3), ("dkv", 4)])
def test_kernels_of_splash_attention_count_all_pairs(kernel: str, products: int) -> None:
    text = module(
        "%block_mask = s8[1,1,1]{2,1,0} parameter(0)",
        "%q = bf16[2,16,512,64]{3,2,1,0} parameter(1)",
        "%k = bf16[2,4,512,64]{3,2,1,0} parameter(2)",
        f"ROOT %splash_mha_{kernel}_segmented_residuals.1 = (f32[2,512,128]{{2,1,0}}, "
        "bf16[2,16,512,64]{3,2,1,0}) custom-call(%block_mask, %q, %k, %k), "
        'custom_call_target="tpu_custom_call"',
    )
    assert hlo.costs(text, slice_size=1).matmul_flops == products * 2 * 2 * 16 * 512 * 512 * 64


def test_cublas_call_counts_as_dot() -> None:
    text = module(
        "%a = bf16[128,512]{1,0} parameter(0)",
        "%b = bf16[64,512]{1,0} parameter(1)",
        "%call = (bf16[128,64]{1,0}, s8[4194304]{0}) custom-call(%a, %b), "
        'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{'
        '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}',
        '%other = f32[] custom-call(%a), custom_call_target="AllocateBuffer"',
    )
    assert hlo.costs(text, slice_size=1).matmul_flops == 2 * 128 * 64 * 512


@pytest.mark.parametrize(("target", "products"), [("fmhaSoftmax", 2), ("fmhaSoftmaxBackward", 5)])
def test_attention_of_cudnn_counts_its_products(target: str, products: int) -> None:
    text = module(
        "%q = bf16[16,512,12,64]{3,2,1,0} parameter(0)",
        "%k = bf16[16,256,4,64]{3,2,1,0} parameter(1)",
        "%call = (bf16[16,12,512,64]{3,1,2,0}, f32[16,12,512]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), "
        f'custom_call_target="__cudnn${target}", backend_config={{"fmha_scale":0.125}}',
    )
    assert hlo.costs(text, slice_size=1).matmul_flops == products * 2 * 16 * 12 * 512 * 256 * 64


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=4] {'a'}", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
    ],
)
def test_replica_groups_in_each_notation(attributes: str, groups: list[list[int]]) -> None:
    assert hlo.replica_groups(f", channel_id=1, {attributes}, dimensions={{0}}") == groups


# {instruction: (sent within, sent between) by each of 8 devices, in two slices of 4}
@pytest.mark.parametrize(
    ("instruction", "within", "between"),
    [
        ("f32[80] all-gather(%x), replica_groups=[1,8]<=[8]", 3 * 40, 40),
        ("f32[40] all-gather(%x), replica_groups=[2,4]<=[8]", 3 * 40, 0),
        ("f32[10] all-reduce(%x), replica_groups=[1,8]<=[8]", 2 * 40 * 3 / 4, 2 * 10 * 1 / 2),
        ("f32[10] all-reduce(%x), replica_groups=[4,2]<=[2,4]T(1,0)", 0, 2 * 40 * 1 / 2),
        ("f32[2] reduce-scatter(%x), replica_groups=[2,4]<=[8]", 40 * 3 / 4, 0),
        ("f32[10] all-to-all(%x), replica_groups=[2,4]<=[8]", 40 * 3 / 4, 0),
        ("(f32[10], f32[10]) collective-permute-start(%x), source_target_pairs={{0,1},{3,4}}", 20, 20),
        ("(f32[10], f32[80]) all-gather-start(%x), replica_groups=[1,8]<=[8]", 3 * 40, 40),
        (
            "(f32[10], u32[], token[]) send(%x, %t), frontend_attributes={_xla_megascale_target="
            '"{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}',
            0,
            2 * 40 * 1 / 2,
        ),
        ("f32[10] add(%x, %x)", 0, 0),
    ],
)
def test_bytes_that_a_device_sends(instruction: str, within: float, between: float) -> None:
    costs = hlo.costs(module("%x = f32[10]{0} parameter(0)", f"%y = {instruction}"), slice_size=4)
    assert sum(costs.bytes_by_kind(between=False).values()) == within
    assert sum(costs.bytes_by_kind(between=True).values()) == between


def test_collective_that_spans_computations_counts_once() -> None:
    # on TPU a collective stands in each computation that runs while it does, under the same channel
    gather = "f32[40] all-gather(%x), channel_id=4, replica_groups=[1,4]<=[4], dimensions={0}"
    text = module("%x = f32[10]{0} parameter(0)", f"%y = {gather}", f"%z = {gather}")
    assert hlo.costs(text, slice_size=4).bytes_by_kind(between=False) == {"all-gather": 120}
    other = module("%x = f32[10]{0} parameter(0)", f"%y = {gather}", f"%z = {gather.replace('=4,', '=5,')}")
    assert hlo.costs(other, slice_size=4).bytes_by_kind(between=False) == {"all-gather": 240}


def test_all_reduce_of_which_a_slice_is_kept_is_a_reduce_scatter() -> None:
    reduce = "%y = f32[40] all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4]"
    text = module("%x = f32[40]{0} parameter(0)", reduce, name="all-reduce-scatter.5.clone")
    assert hlo.costs(text, slice_size=4).bytes_by_kind(between=False) == {"reduce-scatter": 120}


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("f32[2,3]", 24),
        ("(bf16[4]{0:T(8,128)(2,1)S(1)}, pred[], s4[8])", 13),
        ("f8e4m3fn[5]", 5),
        ("token[]", 0),
    ],
)
def test_bytes_of_a_shape(shape: str, size: float) -> None:
    assert hlo.size_bytes(shape) == size
