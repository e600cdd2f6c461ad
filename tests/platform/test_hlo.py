"""Memory traffic and collectives of compiled programs, for programs with known traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from singer_jax.platform import hlo

# As the compiler for TPUs writes it: S(1) is the chip's fast memory, T(8,128) tiles.
TPU = """HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {
  %arg = (s32[]{:T(128)}, f32[1024,1024]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %x = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %y = f32[1024,1024]{1,0:T(8,128)} negate(%x)
  ROOT %t = (s32[]{:T(128)}, f32[1024,1024]{1,0:T(8,128)}) tuple(%i, %y)
}

%condition (arg.1: (s32[], f32[1024,1024])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[1024,1024]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %n), direction=LT
}

%fused (param_0: f32[8,1024,1024], param_1: s32[]) -> f32[1,1024,1024] {
  %param_0 = f32[8,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %param_1 = s32[]{:T(128)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  ROOT %slice = f32[1,1024,1024]{2,1,0:T(8,128)} dynamic-slice(%param_0, %param_1, %zero)
}

ENTRY %main (p0: f32[8,1024,1024], p1: bf16[100,130], p2: s32[]) -> f32[1024,1024] {
  %p0 = f32[8,1024,1024]{2,1,0:T(8,128)} parameter(0)
  %p1 = bf16[100,130]{1,0:T(8,128)(2,1)} parameter(1)
  %p2 = s32[]{:T(128)} parameter(2)
LINES
  ROOT %end = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%last), index=1
}
"""
MATRIX = 4 * 1024 * 1024


def of_tpu(*lines: str, trips: float = 1) -> hlo.Moved:
    text = "\n".join(f"  {line}" for line in lines)
    return hlo.moved(TPU.replace("LINES", text), trips)


WHOLE = "f32[8,1024,1024]{2,1,0:T(8,128)}"
PART = "f32[1,1024,1024]{2,1,0:T(8,128)}"
FAST = "f32[1,1024,1024]{2,1,0:T(8,128)S(1)}"


@pytest.mark.parametrize(
    ("line", "moves"),
    [
        (
            "%a = (f32[1024,1024]{1,0}, s8[33554432]{0}) custom-call(%p0), "
            'custom_call_target="__cublas$gemm"',
            9 * MATRIX,  # without its scratch memory
        ),
        (f"%a = {WHOLE} negate(%p0)", 16 * MATRIX),
        (f"%a = {WHOLE.replace(')}', ')S(1)}')} negate(%p0)", 8 * MATRIX),
        # A fetch of a slice into fast memory reads the slice, not the array.
        (f"%a = (({WHOLE}), {FAST}, s32[]) slice-start(%p0), slice={{[0:1]}}", MATRIX),
        (f"%a = {PART} fusion(%p0, %p2), kind=kLoop, calls=%fused", 2 * MATRIX),
        (f"%a = {PART} dynamic-slice(%p0, %p2, %p2, %p2)", 2 * MATRIX),
        (f"%a = ({FAST}, {PART}, u32[]) copy-start(%p0)", 8 * MATRIX),
        # 100 x 130 of two bytes, in tiles of 8 x 128.
        ("%a = bf16[100,130]{1,0:T(8,128)(2,1)} copy(%p1)", 2 * 2 * 104 * 256),
        ("%a = bf16[100,130]{0,1:T(8,128)(2,1)} copy(%p1)", 2 * (104 * 256 + 128 * 136)),
        (f"%a = {PART} bitcast(%p0)", 0),
    ],
)
def test_an_instruction(line, moves):
    assert of_tpu(line).traffic == pytest.approx(moves, rel=1e-5)


LOOP = "(s32[]{:T(128)}, f32[1024,1024]{1,0:T(8,128)})"


def test_a_loop_counts_as_often_as_it_runs():
    line = f"%last = {LOOP} while(%p0), condition=%condition, body=%body"
    assert of_tpu(line).traffic == pytest.approx(5 * 2 * MATRIX, rel=1e-3)
    known = line + ', backend_config={"known_trip_count":{"n":"3"}}'
    assert of_tpu(known).traffic == pytest.approx(3 * 2 * MATRIX, rel=1e-3)


def test_a_loop_of_unknown_length():
    text = TPU.replace(
        "%lt = pred[]{:T(512)} compare(%i.1, %n)", "%lt = pred[] compare(%i.1, %i.1)"
    )
    line = f"  %last = {LOOP} while(%p0), condition=%condition, body=%body"
    found = hlo.moved(text.replace("LINES", line), 7)
    assert found.traffic == pytest.approx(7 * 2 * MATRIX, rel=1e-3)


def test_collectives():
    found = of_tpu(
        "%a = (f32[1024]{0:T(1024)}, f32[1024]{0:T(1024)}) all-reduce(%p0, %p0), to_apply=%add",
        "%b = (f32[4]{0}, f32[1024]{0}) all-gather-start(%p1), dimensions={0}",
        "%c = f32[1024]{0} all-gather-done(%b)",
    )
    assert found.collectives == {"all-reduce": (1, 2 * 4096), "all-gather": (1, 4096)}


def test_a_condition_counts_with_its_cheaper_branch():
    text = TPU.replace(
        "%body (arg",
        "%empty (e: f32[]) -> f32[] {\n  ROOT %e = f32[] parameter(0)\n}\n\n%body (arg",
    )
    line = "  %a = f32[] conditional(%p2, %p0, %p0), branch_computations={%body, %empty}"
    assert hlo.moved(text.replace("LINES", line)).traffic == 0


def program(function, *shapes, **jit):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function, **jit).lower(*args).compile().as_text()


def test_programs_of_this_machine():
    """The programs are a sum of two arrays, a scan, and a reduction over devices."""
    side = 256
    size = 4 * side * side
    assert hlo.moved(program(jnp.add, (side, side), (side, side))).traffic == 3 * size

    def scan(x, xs):
        return jax.lax.scan(lambda x, y: (x + y, None), x, xs)[0]

    traffic = hlo.moved(program(scan, (side, side), (9, side, side))).traffic
    assert 9 * 3 * size <= traffic <= 9 * 3 * size + 6 * size

    mesh = jax.make_mesh((4,), ("data",), devices=np.array(jax.devices()[:4]))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    text = program(lambda x: x.sum(0), (8, side), in_shardings=rows)
    assert hlo.moved(text).collectives["all-reduce"] == (1, 4 * side)


def test_parts():
    named = 'metadata={op_name="jit(step)/transpose(jvp(student))/mul"}'
    text = TPU.replace(
        "LINES",
        "\n".join(
            [
                f"  %a = {WHOLE} negate(%p0), {named}",
                "  %b = bf16[100,130]{1,0:T(8,128)(2,1)} copy(%p1)",
                # What a loop moves is its own part's where its instructions say none.
                f"  %last = {LOOP} while(%p0), condition=%condition, body=%body, "
                'metadata={op_name="jit(step)/teacher/while"}',
            ]
        ),
    )
    found = hlo.moved(text, 1, ("teacher", "student"))
    assert found.by_part["student"] == 16 * MATRIX
    assert found.by_part["teacher"] == pytest.approx(10 * MATRIX, rel=1e-3)
    assert found.by_part[""] == pytest.approx(2 * 2 * 104 * 256)
    assert sum(found.by_part.values()) == found.traffic
