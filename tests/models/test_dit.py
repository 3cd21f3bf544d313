"""The transformer: batches, padding, permutations, precision, remat, sizes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from support import tiny

from refalign_jax.config import AlignmentConfig, DiTConfig, ModelConfig, wan_1_3b, wan_14b
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.table import published_shapes
from refalign_jax.initial import model_shapes
from refalign_jax.models import dit, gradients, rope
from refalign_jax.models.attention import attention
from refalign_jax.models.condition import Condition
from refalign_jax.models.dit import patchify, unpatchify
from refalign_jax.objective import sample_terms
from refalign_jax.trees import count

TIMES = jnp.array([300, 40, 800])


@functools.partial(jax.jit, static_argnames="config")
def forward(params, latents, t, text, references=None, counts=None, config=tiny.DIT):
    return dit.velocity(params["dit"], config, latents, t, Condition(text, references, counts))


@functools.partial(jax.jit, static_argnames="config")
def all_of_it(params, batch, noise, index, config=tiny.MODEL):
    """Velocity, terms and gradient in one program."""

    def loss(params):
        terms, velocity = sample_terms(params, batch, noise, index, jnp.int32(0), config)
        return jnp.mean(terms.loss), (terms, velocity)

    (_, (terms, velocity)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return velocity, terms, gradient


def take(batch, i, count):
    """Sample i alone, without padding."""
    one = jax.tree.map(lambda x: x[i : i + 1], batch)
    return one._replace(
        reference_latents=one.reference_latents[:, :count],
        subject_ids=one.subject_ids[:, :count],
        vfm_features=one.vfm_features[:, :count],
    )


def test_a_mixed_batch_equals_its_samples_one_by_one():
    params, batch = tiny.params(), tiny.batch([1, 2, 3])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)
    together, terms, gradient = all_of_it(params, batch, noise, TIMES)
    summed = None
    for i in range(3):
        alone, index = take(batch, i, i + 1), TIMES[i : i + 1]
        velocity, single, g = all_of_it(params, alone, noise[i : i + 1], index)
        assert tiny.relative(velocity, together[i : i + 1]) <= 1e-6
        for name in ("flow", "pull", "push", "loss"):
            ours, theirs = float(getattr(terms, name)[i]), float(getattr(single, name)[0])
            assert abs(ours - theirs) <= 1e-6 * max(abs(theirs), 1e-3), name
        summed = g if summed is None else jax.tree.map(jnp.add, summed, g)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
        assert tiny.relative(a, b / 3) <= 1e-5


def test_the_content_of_padding_changes_nothing_to_the_bit():
    params, batch = tiny.params(), tiny.batch([1, 2, 2])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)
    padding = (jnp.arange(3) >= batch.num_references[:, None])[..., None, None]
    other = batch._replace(
        reference_latents=jnp.where(padding[..., None], 1e30, batch.reference_latents),
        vfm_features=jnp.where(padding, -1e30, batch.vfm_features),
        subject_ids=jnp.where(padding[..., 0, 0], 0, batch.subject_ids),
    )
    for a, b in zip(
        jax.tree.leaves(all_of_it(params, batch, noise, TIMES)),
        jax.tree.leaves(all_of_it(params, other, noise, TIMES)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_padding_in_attention_is_masked_not_only_zeroed():
    params, batch = tiny.params(), tiny.batch([3])
    t = jnp.array([500.0])
    inputs = (params, batch.video_latents, t, batch.text)
    alone = forward(*inputs, batch.reference_latents[:, :1])
    padded = forward(*inputs, batch.reference_latents, jnp.array([1]))
    unmasked = forward(*inputs, batch.reference_latents.at[:, 1:].set(0))
    assert tiny.relative(padded, alone) <= 1e-6
    assert tiny.relative(unmasked, alone) > 1e-3


def test_permuting_references_with_their_positions_permutes_features_alone():
    params, batch, order = tiny.params()["dit"], tiny.batch([3]), jnp.array([2, 0, 1])

    @jax.jit
    def run(references, order):
        """The velocity and the features of references whose positions are permuted."""
        inputs = dit.embed(params, tiny.DIT, batch.video_latents, jnp.array([500.0]), Condition(batch.text, references))
        video, turns = inputs.shared.rotations
        turns = tuple(x.reshape(1, 3, -1, 1, 12)[:, order].reshape(x.shape) for x in turns)
        inputs = inputs._replace(shared=inputs.shared._replace(rotations=(video, turns)))
        observer = dit.reference_tokens(tiny.DIT, 2, references.shape)
        streams, features = dit.run_blocks(params["blocks"], tiny.DIT, inputs, observer)
        return dit.unembed(params, tiny.DIT, streams[0], inputs.e, batch.video_latents.shape), features

    velocity, features = run(batch.reference_latents, jnp.arange(3))
    permuted, other = run(batch.reference_latents[:, order], order)
    moved, _ = run(batch.reference_latents[:, order], jnp.arange(3))
    assert tiny.relative(permuted, velocity) <= 1e-6
    assert tiny.relative(other, features[:, :, order]) <= 1e-6
    assert tiny.relative(moved, velocity) > 1e-4, "without their positions the order matters"


def test_bfloat16_is_close_to_float32():
    config = dataclasses.replace(tiny.DIT, width=96, num_layers=30, num_heads=2, ffn_width=192)
    params = tiny.params(ModelConfig(dit=config, alignment=tiny.MODEL.alignment), spread=0.02)
    batch = tiny.batch([3])
    inputs = (params, batch.video_latents, jnp.array([500.0]), batch.text, batch.reference_latents)
    exact = forward(*inputs, config=config)
    rounded = forward(*inputs, config=dataclasses.replace(config, compute_dtype="bfloat16"))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < tiny.relative(rounded, exact) <= 1e-2


@pytest.mark.parametrize("remat", ["dots", "attention", "full"])
def test_remat_changes_no_gradient(remat):
    batch = tiny.batch([2])
    noise = jax.random.normal(jax.random.key(7), batch.video_latents.shape)
    config = dataclasses.replace(tiny.MODEL, dit=dataclasses.replace(tiny.DIT, remat=remat))
    plain = all_of_it(tiny.params(), batch, noise, TIMES[:1])
    other = all_of_it(tiny.params(), batch, noise, TIMES[:1], config)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("remat", "offload", "times"),
    [("dots", False, 1), ("attention", False, 1), ("attention", True, 1), ("full", False, 2)],
)
def test_where_attention_is_kept_cudnn_computes_it_once(monkeypatch, remat, offload, times):
    """Traced only, since it takes a GPU to run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_is_flash_attention", lambda *_, **__: None)
    config = dataclasses.replace(tiny.DIT, attention="cudnn", remat=remat, offload=offload, compute_dtype="bfloat16")
    batch, params = tiny.batch([2]), tiny.params()["dit"]

    def loss(params):
        condition = Condition(batch.text, batch.reference_latents)
        return jnp.sum(dit.velocity(params, config, batch.video_latents, jnp.array([300.0]), condition))

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    kinds = 2  # to the tokens and to the text; in one scan
    assert text.count("dot_product_attention_fwd_wrapper[") == times * kinds
    assert text.count("dot_product_attention_bwd_wrapper[") == kinds


def test_odd_numbers_of_tokens_are_padded_for_cudnn(monkeypatch):
    """Traced only, since it takes a GPU to run."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(fused_attention_stablehlo, "check_is_flash_attention", lambda *_, **__: None)
    q, k = (jnp.zeros((2, tokens, 2, 16), jnp.bfloat16) for tokens in (7, 13))
    text = str(jax.make_jaxpr(lambda q, k: attention(q, k, k, None, "cudnn"))(q, k))
    assert text.count("dot_product_attention_fwd_wrapper[") + text.count("dot_product_attention_wrapper[") >= 1, text
    assert "bf16[2,8,2,16]" in text
    assert "bf16[2,14,2,16]" in text
    assert jax.eval_shape(lambda q, k: attention(q, k, k, None, "cudnn"), q, k).shape == q.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_ways_to_a_channels_partner_are_one(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 12)).astype(dtype)
    rolled, multiplied = rope.partner_by_roll(x), rope.partner_by_product(x)
    np.testing.assert_array_equal(rolled, multiplied)
    np.testing.assert_array_equal(rolled[..., 0::2], -x[..., 1::2].astype(jnp.float32))


def test_hand_written_gradients_are_the_derived_ones():
    x, dy = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, 8)) * 3 + 1
    weight = jnp.linspace(-1, 2, 24).reshape(3, 8)
    kernel = jax.random.normal(jax.random.key(1), (24, 24))
    angle = jnp.repeat(jnp.linspace(0, 5, 5 * 4).reshape(1, 5, 1, 4), 2, axis=-1)

    def rms(x, weight):
        y = x * jax.lax.rsqrt(jnp.mean(x**2, axis=(2, 3), keepdims=True) + 1e-6) * weight
        return y * jnp.cos(angle) + rope.partner_by_roll(y) * jnp.sin(angle)

    def norm(x, weight):
        x = x.reshape(2, 5, 24) - jnp.mean(x, axis=(2, 3)).reshape(2, 5, 1)
        return (x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)).reshape(2, 5, 3, 8) * weight

    pairs = (
        (rms, lambda x, w: gradients.rms_norm(x, w, (jnp.cos(angle), jnp.sin(angle)), 1e-6)),
        (norm, lambda x, w: gradients.layer_norm(x.reshape(2, 5, 24), 1e-6, x.dtype).reshape(x.shape) * w),
        (
            lambda x, w: (jax.nn.gelu(x + w, approximate=True).reshape(2, 5, 24) @ kernel).reshape(x.shape),
            lambda x, w: gradients.gelu_product(x.reshape(2, 5, 24), w.reshape(1, 1, 24), kernel).reshape(x.shape),
        ),
    )
    for derived, written in pairs:
        (a, back_a), (b, back_b) = (jax.vjp(f, x, weight) for f in (derived, written))
        for ours, theirs in zip((b, *back_b(dy)), (a, *back_a(dy)), strict=True):
            assert tiny.relative(ours, theirs) <= 1e-5


def test_what_is_observed_are_the_tokens_and_changes_no_velocity():
    params, batch = tiny.params()["dit"], tiny.batch([3])
    inputs = (params, tiny.DIT, batch.video_latents, jnp.array([500.0]), Condition(batch.text, batch.reference_latents))

    @functools.partial(jax.jit, static_argnums=0)
    def observe(observer):
        return dit.observe(*inputs, observer)

    one, features = observe(dit.reference_tokens(tiny.DIT, 2, batch.reference_latents.shape))
    other, states = observe(dit.all_tokens(tiny.DIT))
    plain = dit.velocity(*inputs)
    assert tiny.relative(one, plain) <= 1e-6
    assert tiny.relative(other, plain) <= 1e-6
    tokens = tiny.GRID[0] * 6
    assert states.shape == (3, 1, tokens + 18, 24)
    np.testing.assert_allclose(states[:2, :, tokens:], features.reshape(2, 1, 18, 24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 4, 10), (5, 6, 2)])
def test_any_grid_and_the_patches_round_trip(grid):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, *grid, 16)), jnp.float32)
    tokens = patchify(x, tiny.DIT)
    np.testing.assert_array_equal(unpatchify(tokens, tiny.DIT.token_grid(*grid), tiny.DIT), x)
    velocity = forward(tiny.params(), x, jnp.array([0.0, 1000.0]), jnp.zeros((2, 3, 16)))
    assert velocity.shape == x.shape
    assert jnp.isfinite(velocity).all()


@pytest.mark.parametrize(
    ("manifest", "size", "aligned"),
    [
        ("wan2.1_t2v_1.3b", wan_1_3b(), False),
        ("wan2.1_t2v_14b", wan_14b(), False),
        ("refalign_1.3b", wan_1_3b(), True),
        ("refalign_14b", wan_14b(), True),
    ],
)
def test_full_size_models_have_the_published_tensors(golden, manifest, size, aligned):
    config = ModelConfig(dit=size, alignment=AlignmentConfig())
    shapes = model_shapes(config)
    if not aligned:
        del shapes["projectors"]
    ours = published_shapes(model_table(size, config.alignment if aligned else None), shapes)
    published = json.loads((golden / "manifests" / f"{manifest}.json").read_text())
    assert {name: list(shape) for name, shape in ours.items()} == published
    if manifest == "refalign_14b":
        assert count(shapes) == 14_430_049_344


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"width": 25}, "not divisible by num_heads=2"),
        ({"width": 20}, "each must be even"),
        ({"frequency_width": 7}, "must be even"),
        ({"patch_size": (2, 2, 2)}, "a reference is a single frame"),
        ({"num_layers": 0}, "must be positive"),
        ({"remat": "some"}, "choose one of"),
        ({"compute_dtype": "float16"}, "choose one of"),
    ],
)
def test_impossible_sizes_are_refused_in_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(tiny.DIT, **change)


def test_more_aligned_blocks_than_blocks_are_refused():
    with pytest.raises(ValueError, match=r"more than DiTConfig\.num_layers=3"):
        ModelConfig(dit=tiny.DIT, alignment=AlignmentConfig(num_blocks=4))


def test_a_grid_the_patch_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="not divisible by the patch 2x2"):
        forward(tiny.params(), jnp.zeros((1, 1, 3, 4, 16)), jnp.zeros(1), jnp.zeros((1, 1, 16)))
    with pytest.raises(ValueError, match="max_position"):
        DiTConfig().token_grid(1025, 2, 2)


def test_phantom_is_text_to_video_over_the_references_as_last_frames():
    """There every token passes every layer, so the references may as well be frames whose velocity is thrown away."""
    phantom = dataclasses.replace(tiny.DIT, reference_cross_attention=True)
    params, batch = tiny.params(), tiny.batch([2, 2], references=2)
    t, video, references = jnp.array([300.0, 40.0]), batch.video_latents, batch.reference_latents
    ours = forward(params, video, t, batch.text, references, config=phantom)
    frames = forward(params, jnp.concatenate([video, references], axis=1), t, batch.text)
    assert tiny.relative(ours, frames[:, : video.shape[1]]) <= 2e-6
    assert tiny.relative(forward(params, video, t, batch.text, references), ours) > 1e-3


def test_padded_references_of_phantom_change_nothing():
    phantom = dataclasses.replace(tiny.DIT, reference_cross_attention=True)
    params, batch = tiny.params(), tiny.batch([2, 1], references=2)
    t = jnp.array([300.0, 40.0])
    padded = forward(params, batch.video_latents, t, batch.text, batch.reference_latents, batch.num_references, phantom)
    video, text, references = batch.video_latents[1:], batch.text[1:], batch.reference_latents[1:, :1]
    alone = forward(params, video, t[1:], text, references, config=phantom)
    assert tiny.relative(padded[1:], alone) <= 2e-6
