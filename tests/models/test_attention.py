"""Every kernel computes the same attention, padding is invisible, and a mesh changes nothing."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from refalign_jax.config import AttentionTiles, MeshConfig
from refalign_jax.models.attention import attention, cross_attention, self_attention
from refalign_jax.models.splash import backward_tile, padded_length
from refalign_jax.sharding import make_mesh

TILES = AttentionTiles(q=128, kv=256, kv_compute=128, backward_q=256, backward_kv=128, backward_kv_compute=128)


def draw(*shape: int, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4))


@pytest.mark.parametrize("fused", [False, True])
def test_splash_equals_plain_attention_forwards_and_backwards(fused):
    """In Pallas' interpreter, at 300 tokens, which no tile divides, and with padding."""
    tiles = AttentionTiles(**{**vars(TILES), "fused_backward": fused})
    q, k, v, weights = draw(2, 300, 2, 128)
    lengths = jnp.array([300, 170])

    def loss(q, k, v, kernel):
        out = attention(q, k, v, lengths, kernel, tiles)
        return jnp.sum(out * weights), out

    gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True), static_argnums=3)
    for ours, theirs in zip(*(jax.tree.leaves(gradient(q, k, v, kernel)) for kernel in ("splash", "xla")), strict=True):
        assert tiny.relative(ours, theirs) <= 1e-5


def test_padding_keys_are_never_attended_to():
    q, k, v, noise = draw(2, 40, 2, 128)
    lengths = jnp.array([40, 25])
    hidden = (jnp.arange(40) >= lengths[:, None])[..., None, None]
    for kernel in ("xla", "splash"):
        out, other = (
            attention(q, jnp.where(hidden, x, k), jnp.where(hidden, x, v), lengths, kernel, TILES)
            for x in (noise, 1e4 * noise)
        )
        np.testing.assert_array_equal(out, other)


@pytest.mark.parametrize(
    ("context", "ring", "tensor"), [(4, 1, 2), (2, 1, 1), (1, 1, 4), (1, 8, 1), (2, 2, 2), (2, 4, 1)]
)
def test_streams_on_a_mesh_equal_one_sequence(context, ring, tensor):
    """With a ring of 8, some of its devices hold padding alone."""
    sizes, split = (13, 6), context * ring
    mesh = make_mesh(MeshConfig(fsdp=8 // (split * tensor), context=context, ring=ring, tensor=tensor))
    q, k, v, _ = draw(8, sum(sizes), 8, 16)
    lengths = jnp.array([19, 13, 16, 19, 13, 19, 19, 16])
    ends = list(itertools.accumulate(sizes, initial=0))

    def streams(x):
        parts = [x[:, a:b] for a, b in itertools.pairwise(ends)]
        return tuple(jnp.pad(p, ((0, 0), (0, -p.shape[1] % split), (0, 0), (0, 0))) for p in parts)

    attend = jax.jit(functools.partial(self_attention, sizes=sizes, config=tiny.DIT))
    with jax.set_mesh(mesh):
        out = attend(streams(q), streams(k), streams(v), lengths=lengths)
        crossed = jax.jit(functools.partial(cross_attention, config=tiny.DIT))(streams(q)[0], k, v)
    joined = jnp.concatenate([x[:, :size] for x, size in zip(out, sizes, strict=True)], axis=1)
    assert tiny.relative(joined, attention(q, k, v, lengths, "xla")) <= 1e-6
    assert all(bool((x[:, size:] == 0).all()) for x, size in zip(out, sizes, strict=True))
    assert tiny.relative(crossed[:, :13], attention(q[:, :13], k, v, None, "xla")) <= 1e-6


@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_a_ring_has_the_gradients_of_one_sequence(kernel):
    """Two devices, 150 tokens each, of which the second has padding; samples of three lengths."""
    mesh = make_mesh(MeshConfig(ring=2), jax.devices()[:2])
    sizes, config = (200, 90), dataclasses.replace(tiny.DIT, attention=kernel, tiles=TILES)
    q, k, v, weights = draw(3, sum(sizes), 2, 128)
    lengths = jnp.array([290, 200, 245])

    def streams(x):
        return tuple(jnp.pad(p, ((0, 0), (0, 10), (0, 0), (0, 0))) for p in (x[:, :200], x[:, 200:]))

    def joined(q, k, v):
        out = self_attention(streams(q), streams(k), streams(v), sizes, lengths, config)
        return jnp.concatenate([x[:, :size] for x, size in zip(out, sizes, strict=True)], axis=1)

    def loss(attend, *qkv):
        out = attend(*qkv)
        return jnp.sum(out * weights), out

    plain = functools.partial(loss, lambda q, k, v: attention(q, k, v, lengths, "xla"))
    with jax.set_mesh(mesh):
        (_, out), gradients = jax.jit(
            jax.value_and_grad(functools.partial(loss, joined), argnums=(0, 1, 2), has_aux=True)
        )(q, k, v)
    (_, expected), others = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    assert tiny.relative(out, expected) <= 1e-5
    for ours, theirs in zip(gradients, others, strict=True):
        assert tiny.relative(ours, theirs) <= 1e-5


def test_sequences_are_padded_to_whole_tiles():
    assert padded_length(37_440, 1024, 1024) == 37_888
    assert padded_length(8_190, 512, 1024) == 8_192
    assert padded_length(512, 1024) == 512
    assert padded_length(300, 1024) == 512
    assert padded_length(5, 128, 256) == 128


@pytest.mark.parametrize(("field", "value"), [("q", 100), ("kv", 192), ("kv_compute", 2048)])
def test_tiles_that_no_tpu_has_are_refused(field, value):
    with pytest.raises(ValueError, match=f"AttentionTiles.{field}"):
        AttentionTiles(**{field: value})


@pytest.mark.parametrize(
    ("device", "heads", "tokens", "tile"),
    [
        ("TPU v5 lite", 12, 37_440, 2048),
        ("TPU v6 lite", 12, 37_440, 1024),
        ("TPU v5", 40, 37_440, 1024),
        ("TPU v5", 10, 86_400, 2048),
        ("another", 40, 86_400, 1024),
    ],
)
def test_the_backward_tile_follows_from_the_memory_of_the_device(device, heads, tokens, tile):
    assert backward_tile(tokens * heads * 128 * 2, tokens, device) == tile
