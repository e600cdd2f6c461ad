"""Kernels, launches and modelled time, for a program with known kernels."""

import pytest

from singer_jax.platform import kernels
from singer_jax.platform.chips import CHIPS

H200 = CHIPS["NVIDIA H200"]
TRITON = (
    "kind=kCustom, calls=%product, "
    'metadata={op_name="jit(step)/teacher/dot"}, backend_config={"kind":"__triton_gemm"}'
)
CUBLAS = (
    'custom_call_target="__cublas$lt$matmul", '
    'metadata={op_name="jit(step)/transpose(jvp(student))/dot"}, '
    'backend_config={"gemm_backend_config":{"beta":1,"epilogue":"BIAS",'
    '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}'
)
PROGRAM = f"""HloModule jit_step

%product (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {{
  %a = bf16[64,32]{{1,0}} parameter(0)
  %b = bf16[32,16]{{1,0}} parameter(1)
  ROOT %dot = bf16[64,16]{{1,0}} dot(%a, %b), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}

%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{{0}} get-tuple-element(%s), index=1
  %y = f32[8]{{0}} negate(%x)
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%i, %y)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}}

ENTRY %main (p0: bf16[64,32], p1: bf16[32,16], p2: (s32[], f32[8])) -> (bf16[64,16], f32[8]) {{
  %p0 = bf16[64,32]{{1,0}} parameter(0)
  %p1 = bf16[32,16]{{1,0}} parameter(1)
  %p2 = (s32[], f32[8]{{0}}) parameter(2)
  %fused = bf16[64,16]{{1,0}} fusion(%p0, %p1), {TRITON}
  %lt = (bf16[64,16]{{1,0}}, s8[512]{{0}}) custom-call(%p0, %p1, %fused), {CUBLAS}
  %out = bf16[64,16]{{1,0}} get-tuple-element(%lt), index=0
  %loop = (s32[], f32[8]{{0}}) while(%p2), condition=%condition, body=%body
  %last = f32[8]{{0}} get-tuple-element(%loop), index=1
  ROOT %end = (bf16[64,16]{{1,0}}, f32[8]{{0}}) tuple(%out, %last)
}}
"""


@pytest.fixture(scope="module")
def found() -> kernels.Kernels:
    return kernels.read(PROGRAM, H200, ("teacher", "student"))


def test_a_loop_counts_as_often_as_it_runs(found):
    assert found.count == 2 + 5
    assert found.each[-1].runs == 5


def test_products_have_their_operations_part_and_epilogue(found):
    triton, cublas, *_ = found.each
    assert triton.flops == cublas.flops == 2 * 64 * 32 * 16
    assert (triton.kind, triton.part, triton.backward) == ("fusion __triton_gemm", "teacher", False)
    assert (cublas.part, cublas.backward) == ("student", True)
    assert kernels.epilogues(found) == {"__cublas$lt$matmul BIAS +": 1}
    moved = 2 * (64 * 32 + 32 * 16 + 64 * 16)
    assert triton.traffic == moved and cublas.traffic == moved + 2 * 64 * 16


def test_a_loop_makes_the_host_wait_and_each_array_takes_its_time(found):
    assert found.waits == 1 and found.arrays == 3 + 2
    assert found.seconds == found.device_seconds + 5 * kernels.HOST_PER_ARRAY


def test_no_kernel_is_faster_than_the_data_sheet_allows(found):
    for one in found.each:
        assert one.seconds > max(one.traffic / H200.bandwidth, one.flops / H200.bf16)


def test_launches_inside_a_graph_or_a_branch_do_not_count():
    text = """000: kCommandBuffer  [source | next=003 (1)]
    001: kCustomKernel [source | sink] a grid: [1, 1, 1]
    002: kCublasLtMatmul [source | sink] b
003: kConditional    [prev=000 (1) | next=004 (1)]
  true_branch:
    000: kCommandBuffer [source | sink]
004: kCopy [prev=003 (1) | sink] kCopy
"""
    assert kernels.top_level(text) == ["kCommandBuffer", "kConditional", "kCopy"]
