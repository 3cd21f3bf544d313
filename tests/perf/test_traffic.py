"""Bytes that programs move, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from refalign_jax.perf import hlo, traffic

TEXT = """HloModule test

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%in_place (s: f32[16,4], x: f32[1,4]) -> f32[16,4] {
  %s = f32[16,4]{1,0} parameter(0)
  %x = f32[1,4]{1,0} parameter(1)
  %zero.2 = s32[] constant(0)
  ROOT %updated = f32[16,4]{1,0} dynamic-update-slice(%s, %x, %zero.2, %zero.2)
}

%halves (s: f32[16,4], x: bf16[8,4]) -> (bf16[4,4], f32[4]) {
  %s = f32[16,4]{1,0} parameter(0)
  %x.1 = bf16[8,4]{1,0} parameter(1)
  %part = f32[4,4]{1,0} slice(%s), slice={[0:4], [0:4]}
  %other = f32[4,4]{1,0} slice(%s), slice={[4:8], [0:4]}
  %twice = f32[4,4]{1,0} add(%part, %other)
  %few = bf16[4,4]{1,0} slice(%x.1), slice={[0:4], [0:4]}
  %narrow = bf16[4,4]{1,0} convert(%twice)
  %both = bf16[4,4]{1,0} multiply(%narrow, %few)
  %total = f32[4]{0} reduce(%twice, %zero.3), dimensions={1}, to_apply=%sum
  ROOT %results = (bf16[4,4]{1,0}, f32[4]{0}) tuple(%both, %total)
}

%product (a: f32[8,4], b: f32[4,4]) -> f32[8,4] {
  %a.1 = f32[8,4]{1,0} parameter(0)
  %b.1 = f32[4,4]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,4]{1,0} dot(%a.1, %b.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %near = f32[8,4]{1,0:T(8,128)S(1)} add(%y, %y), metadata={op_name="jit(f)/while/body/Block/add"}
  %z = f32[8,4]{1,0} multiply(%near, %y), metadata={op_name="jit(f)/transpose(jvp(Block))/mul"}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %z)
}

ENTRY %main (a: f32[8,4], s: f32[16,4], x: f32[1,4], b: f32[4,4]) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %s = f32[16,4]{1,0} parameter(1)
  %x = f32[1,4]{1,0} parameter(2)
  %b = f32[4,4]{1,0} parameter(3)
  %w = bf16[8,4]{1,0} parameter(4)
  %zero = s32[] constant(0)
  %stack = f32[16,4]{1,0} fusion(%s, %x), kind=kLoop, calls=%in_place
  %split = (bf16[4,4]{1,0}, f32[4]{0}) fusion(%stack, %w), kind=kInput, calls=%halves
  %dots = f32[8,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%product
  %kernel = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%dots), custom_call_target="__cudnn$fmhaSoftmax"
  %gathered = f32[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[1,8]<=[8]
  %turned = f32[4,8]{0,1} transpose(%gathered), dimensions={1,0}
  %t = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
}
"""


def test_each_kind_of_pass_is_counted_by_hand():
    found = {p.name: p for p in traffic.passes(hlo.parse(TEXT))}
    assert {name: (p.kind, p.bytes, p.times) for name, p in found.items()} == {
        "stack": ("copies", 16 + 16, 1),  # the update is read and written, not the array that it is put into
        "split": ("elementwise", 128 + 32 + 32 + 16, 1),  # two of four parts of one operand, half of the other
        "dots": ("products", 128 + 64 + 128, 1),
        "kernel": ("kernels", 128 + 128, 1),
        "gathered": ("collectives", 16 + 128, 1),
        "turned": ("copies", 128 + 128, 1),
        "near": ("elementwise", 128, 5),  # the operand once, and the result stays on the chip
        "z": ("elementwise", 128 + 128, 5),
    }
    assert found["near"].source == "Block/add"
    assert found["z"].source == "backward Block/mul"
    moved = traffic.measure(hlo.parse(TEXT), number=2)
    assert moved["largest"][0] == {"kind": "elementwise", "source": "backward Block/mul", "count": 5, "gb": 0.0}
    assert moved["elementwise_gb"] == round((208 + 5 * 384 + 32 + 256) / 1e9, 2)


@pytest.mark.parametrize("trips", [1, 3])
def test_a_real_program_moves_what_it_reads_and_writes(trips):
    """One fused pass an iteration over an array of 4 MiB, as this machine's compiler writes it."""

    def program(x):
        return jax.lax.fori_loop(0, trips, lambda i, y: jnp.sin(y) * 2 + 1, x)

    text = jax.jit(program, donate_argnums=0).lower(jnp.ones((1024, 1024))).compile().as_text()
    large = [p for p in traffic.passes(hlo.parse(text)) if p.bytes > 2**20 and p.kind == "elementwise"]
    assert sum(p.bytes * p.times for p in large) == trips * 2 * 2**22


def test_a_reduce_scatter_as_tpus_write_it():
    """An all-reduce in a fusion that keeps one part; `hlo.parse` calls it what it is."""
    text = """
%all-reduce-scatter.1 (x: f32[8,4]) -> f32[1,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %all-reduce.1 = f32[8,4]{1,0:T(8,128)} all-reduce(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%sum
  ROOT %part = f32[1,4]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={1,4}
}

ENTRY %main (a: f32[8,4]) -> f32[1,4] {
  %a = f32[8,4]{1,0} parameter(0)
  ROOT %scattered = f32[1,4]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = traffic.passes(hlo.parse(text))
    assert (one.kind, one.bytes) == ("collectives", 128 + 16)


def test_a_fusion_that_runs_beside_others_is_counted_as_one():
    beside = TEXT.replace(
        "%stack = f32[16,4]{1,0} fusion(%s, %x), kind=kLoop, calls=%in_place",
        "%begun = ((f32[16,4]{1,0}, f32[1,4]{1,0}), f32[16,4]{1,0}, u32[]) fusion-start(%s, %x), kind=kLoop, "
        "calls=%in_place\n  %stack = f32[16,4]{1,0} fusion-done(%begun)",
    )
    before, after = ({p.name: (p.kind, p.bytes) for p in traffic.passes(hlo.parse(text))} for text in (TEXT, beside))
    assert after.pop("begun") == before.pop("stack")
    assert after == before


def test_newer_text_names_the_elements_of_tuples():
    newer = TEXT.replace("  %y = f32[8,4]{1,0} get-tuple-element(%p), index=1\n", "").replace("%y", "%p#1")
    older = {p.name: p.bytes for p in traffic.passes(hlo.parse(TEXT))}
    assert {p.name: p.bytes for p in traffic.passes(hlo.parse(newer))} == older
