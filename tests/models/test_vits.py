"""DINOv2 and SigLIP2: their grid, their configurations, and what is refused; tests/parity compares the numbers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax.models import dinov2, siglip2
from refalign_jax.models.vit import fit_to_cells, resize

SMALL = {"width": 24, "ffn_width": 32, "num_layers": 2, "num_heads": 3}
DINOV2 = dinov2.DINOv2Config(**SMALL, grid=5)
SIGLIP2 = siglip2.SigLIP2Config(**SMALL, grid=3)
MODELS = [(dinov2, DINOV2), (siglip2, SIGLIP2), (siglip2, dataclasses.replace(SIGLIP2, naflex=True))]
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 64, 96, 3)).astype(np.float32)
PUBLISHED = {"model_type": "dinov2", "hidden_size": 24, "num_attention_heads": 3, "image_size": 70}


def params_of(model, config):
    return jax.jit(model.init, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.parametrize(("model", "config"), MODELS, ids=["dinov2", "siglip2", "naflex"])
def test_one_feature_for_each_token_of_the_dit(model, config):
    params = params_of(model, config)
    features = model.encode(params, PIXELS, config)
    assert features.shape == (2, 4, 6, 24)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(features[1:], model.encode(params, PIXELS[1:], config), atol=2e-5)
    moved = params | {"position_embedding": params["position_embedding"][..., ::-1, :]}
    assert np.abs(model.encode(moved, PIXELS, config) - features).max() > 1e-3
    with pytest.raises(ValueError, match=r"The image is 56x96 pixels; \w+ needs multiples of 16"):
        model.encode(params, PIXELS[:, :56], config)


def test_images_are_resized_for_patches_of_14_alone():
    ramp = jnp.broadcast_to(jnp.linspace(-1, 1, 96)[:, None], (1, 64, 96, 3))
    assert fit_to_cells(ramp, DINOV2).shape == (1, 56, 84, 3)
    np.testing.assert_allclose(
        fit_to_cells(ramp, DINOV2)[0, 20, 10:74, 0],
        (np.arange(10, 74) + 0.5) * 96 / 84 / 47.5 - 0.5 / 47.5 - 1,
        atol=2e-3,
    )
    assert fit_to_cells(ramp, SIGLIP2) is ramp


@pytest.mark.parametrize("method", ["bicubic", "bicubic_antialias", "bilinear_antialias"])
def test_resizing_keeps_what_is_constant_and_the_same_size(method):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 6, 2)), jnp.float32)
    np.testing.assert_allclose(resize(x, (4, 6), method), x, atol=1e-6)
    np.testing.assert_allclose(resize(jnp.ones((1, 4, 6, 2)), (9, 3), method), 1, atol=1e-6)


def test_registers_and_options_come_from_config_json():
    plain = dinov2.DINOv2Config.from_json(PUBLISHED | {"use_mask_token": False})
    assert (plain.num_register_tokens, plain.resampling, plain.grid, plain.mask_token) == (0, "bicubic", 5, False)
    assert {"register_tokens", "mask_token"}.isdisjoint(params_of(dinov2, dataclasses.replace(plain, num_layers=1)))
    more = {"model_type": "dinov2_with_registers", "patch_size": 14, "use_swiglu_ffn": True, "qkv_bias": False}
    giant = dinov2.DINOv2Config.from_json(PUBLISHED | more)
    assert (giant.num_register_tokens, giant.resampling) == (4, "bicubic_antialias")
    assert (giant.use_gated_mlp, giant.hidden_act, giant.ffn_width, giant.query_bias) == (True, "silu", 64, False)
    fixed = siglip2.SigLIP2Config.from_json({"model_type": "siglip", "vision_config": {"image_size": 256}})
    assert (fixed.grid, fixed.width, fixed.naflex) == (16, 768, False)
    assert siglip2.SigLIP2Config.from_json({"model_type": "siglip2", "vision_config": {"num_patches": 9}}).grid == 3


@pytest.mark.parametrize(
    ("kind", "published", "message"),
    [
        (dinov2.DINOv2Config, PUBLISHED | {"model_type": "dinov3_vit"}, "must be 'dinov2' or 'dinov2_with_registers'"),
        (dinov2.DINOv2Config, PUBLISHED | {"image_size": [70, 84]}, r"image_size \[70, 84\]; it must be a whole"),
        (dinov2.DINOv2Config, PUBLISHED | {"image_size": 13}, "image_size 13; it must be at least patch_size, 14"),
        (dinov2.DINOv2Config, PUBLISHED | {"num_channels": 1}, "num_channels 1"),
        (dinov2.DINOv2Config, PUBLISHED | {"hidden_size": 25}, "width is 25; it must be a multiple of num_heads, 3"),
        (dinov2.DINOv2Config, PUBLISHED | {"hidden_act": "relu"}, "hidden_act is 'relu'"),
        (siglip2.SigLIP2Config, {"model_type": "siglip2", "vision_config": {"num_patches": 8}}, "num_patches 8"),
        (siglip2.SigLIP2Config, {"model_type": "siglip", "vision_config": 3}, "vision_config 3; it must be an object"),
    ],
    ids=str,
)
def test_config_json_that_is_wrong(kind, published, message):
    with pytest.raises(ValueError, match=message):
        kind.from_json(published)
