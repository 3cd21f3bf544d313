"""Collectives read from programs whose collectives are known."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from refalign_jax.config import MeshConfig
from refalign_jax.perf import hlo
from refalign_jax.sharding import make_mesh

TPU = """HloModule test

%condition (p: (s32[], f32[8,4])) -> pred[] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%start (x: f32[2,4]) -> f32[8,4] {
  %x = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=7, replica_groups=mesh['a'=4] {'a'}
}

%go_on (x: f32[2,4]) -> f32[8,4] {
  %x = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,4]{1,0:T(8,128)} all-gather(%x), channel_id=7, replica_groups=mesh['a'=4] {'a'}
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %y = f32[8,4]{1,0} get-tuple-element(%p), index=1
  %s = f32[2,4]{1,0} slice(%y), slice={[0:2], [0:4]}
  %async-collective-start = f32[8,4]{1,0} fusion(%s), kind=kCustom, calls=%start
  %async-collective-fusion = f32[8,4]{1,0} fusion(%s), kind=kCustom, calls=%go_on
  %z = f32[8,4]{1,0:T(8,128)S(1)} add(%async-collective-fusion, %y)
  %moved = f32[8,4]{1,0} all-to-all(%z), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  %again = f32[8,4]{1,0} all-to-all(%moved), channel_id=1, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%i, %again)
}

%all-reduce-scatter.1 (w: f32[8,4]) -> f32[2,4] {
  %w = f32[8,4]{1,0} parameter(0)
  %all-reduce.1 = f32[8,4]{1,0:T(8,128)S(1)} all-reduce(%w), channel_id=9, replica_groups=[1,4]<=[4], to_apply=%sum
  ROOT %part = f32[2,4]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={2,4}
}

ENTRY %main (a: f32[8,4]) -> (s32[], f32[8,4]) {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %scattered = f32[2,4]{1,0:T(8,128)S(1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %loop = (s32[], f32[8,4]{1,0}) while(%t), condition=%condition, body=%body
}
"""
"""As the TPU compiler writes: a gather that starts in one fusion and goes on in another, layouts with memory spaces."""


def test_newer_text_names_the_elements_of_tuples():
    newer = re.sub(r"\n.* get-tuple-element\(.*", "", TPU)
    newer = newer.replace("(%y)", "(%p#1)").replace(", %y)", ", %p#1)").replace("(%i,", "(%p#0,")
    assert newer.count("#") == 4
    assert hlo.collectives(hlo.parse(newer)) == hlo.collectives(hlo.parse(TPU))


def test_loops_are_multiplied_out_and_an_asynchronous_collective_counts_once():
    moved = hlo.collectives(hlo.parse(TPU))
    assert moved.count == {"all-gather": 5, "all-to-all": 10, "reduce-scatter": 1}
    assert moved.received == {"all-gather": 5 * 96, "all-to-all": 10 * 64, "reduce-scatter": 96}


@pytest.mark.parametrize("trips", [1, 3])
def test_a_real_program(trips):
    """A sum over eight devices in a loop, as this machine's compiler writes it."""
    mesh = make_mesh(MeshConfig(fsdp=8))

    def program(x):
        add = jax.shard_map(lambda y: jax.lax.psum(y, "fsdp"), mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"))
        return jax.lax.fori_loop(0, trips, lambda i, y: jnp.sin(add(y)), x)

    text = jax.jit(program).lower(jnp.ones((16, 32))).compile().as_text()
    moved = hlo.collectives(hlo.parse(text))
    assert moved.count["all-reduce"] == trips
    assert moved.received["all-reduce"] == trips * 2 * (2 * 32 * 4) * 7 // 8


def test_arrays_by_instruction():
    program = hlo.parse(TPU)
    assert hlo.arrays(program, "all-gather") == {(8, 4)}
    assert (2, 4) in hlo.arrays(program)


def test_two_programs_are_compared():
    assert hlo.compare(TPU, TPU) == ["The programs have the same instructions and collectives."]
    shorter = TPU.replace("constant(5)", "constant(4)")
    assert any(re.match(r"all-to-all: 10 of .* → 8 of", line) for line in hlo.compare(TPU, shorter))


STARTS = """HloModule test

ENTRY %main (a: f32[2,4], b: bf16[2,4]) -> f32[8,4] {
  %a = f32[2,4]{1,0} parameter(0)
  %b = bf16[2,4]{1,0} parameter(1)
  %one = (f32[2,4]{1,0}, f32[8,4]{1,0:T(8,128)}) all-gather-start(%a), channel_id=1, G
  %two = ((f32[2,4], /*index=1*/bf16[2,4]), (f32[8,4]{1,0}, bf16[8,4]{1,0})) all-gather-start(%a, %b), channel_id=2, G
  %three = ((f32[8,4], f32[8,4]), (f32[2,4]{1,0}, f32[2,4]{1,0})) reduce-scatter-start(%c, %d), channel_id=3, G
  %four = ((f32[8]{0}), f32[8]{0}) all-reduce-start(%e), channel_id=4, G
  %five = (f32[8]{0}, f32[8]{0}) all-reduce-start(%e, %f), channel_id=5, G
  %six = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%e), channel_id=6, source_target_pairs={{0,1}}
  ROOT %done = f32[8,4]{1,0} all-gather-done(%one)
}
"""
"""As compilers write collectives that run beside other work: operands, then results."""


def test_started_collectives_count_their_results_alone():
    moved = hlo.collectives(hlo.parse(STARTS.replace(" G\n", " replica_groups=[1,4]<=[4]\n")))
    assert moved.count == {"all-gather": 2, "reduce-scatter": 1, "all-reduce": 2, "collective-permute": 1}
    assert moved.received == {
        "all-gather": 3 * 32 + (3 * 32 + 3 * 16),
        "reduce-scatter": 2 * 32 * 3,
        "all-reduce": 2 * 24 + 2 * 48,
        "collective-permute": 32,
    }
