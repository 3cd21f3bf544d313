"""DINOv3 against golden values, and its properties."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.vit import load_dinov3
from refalign_jax.models.dinov3 import (
    DINOv3Config,
    encode,
    encode_tokens,
    init,
)
from refalign_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD, normalize

GOLDEN = Path(__file__).parents[1] / "golden" / "encoders_a"
PUBLISHED = json.loads((GOLDEN / "dinov3.json").read_text())
CONFIG = DINOv3Config.from_json(PUBLISHED)
VALUES = np.load(GOLDEN / "values.npz")
PIXELS = VALUES["dino_pixels"].transpose(0, 2, 3, 1)
TOKENS = VALUES["dino_tokens"]


def relative_error(ours, theirs):
    return np.linalg.norm(np.asarray(ours, np.float64) - theirs) / np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def params():
    return load_dinov3(CONFIG, open_weights(GOLDEN / "dinov3.safetensors"))


def test_golden_tokens(params):
    assert relative_error(encode_tokens(params, PIXELS, CONFIG), TOKENS) <= 1e-5


def test_encode_normalises_and_keeps_the_patches(params):
    raw = (PIXELS * np.asarray(IMAGENET_STD) + np.asarray(IMAGENET_MEAN)) * 2 - 1
    features = encode(params, raw.astype(np.float32), CONFIG)
    assert features.shape == (2, 6, 10, 32)
    assert relative_error(features.reshape(2, 60, 32), TOKENS[:, 5:]) <= 1e-5


def test_normalize_of_known_colours():
    black_white = jnp.stack([-jnp.ones((1, 1, 3)), jnp.ones((1, 1, 3))])
    expected = [[-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]]
    np.testing.assert_allclose(normalize(black_white)[:, 0, 0], expected, rtol=1e-6)


def test_images_of_a_batch_do_not_mix(params):
    together = encode_tokens(params, PIXELS, CONFIG)
    alone = encode_tokens(params, PIXELS[1:], CONFIG)
    np.testing.assert_allclose(together[1:], alone, atol=2e-6)


def test_bfloat16_is_near_float32(params):
    config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
    features = encode_tokens(params, PIXELS, config)
    assert features.dtype == jnp.float32
    assert 1e-5 < relative_error(features, TOKENS) < 0.02


def test_gated_shapes_without_biases():
    config = dataclasses.replace(
        CONFIG, use_gated_mlp=True, hidden_act="silu", query_bias=False, value_bias=False, num_register_tokens=0
    )
    pixels = jax.random.normal(jax.random.key(0), (1, 32, 48, 3))
    params = jax.jit(init, static_argnums=0)(config, jax.random.key(1))
    assert "bias" not in params["blocks"]["query"]
    assert params["blocks"]["mlp_gate"]["kernel"].shape == (2, 32, 64)
    tokens = encode_tokens(params, pixels, config)
    assert tokens.shape == (1, 1 + 6, 32)
    assert bool(jnp.isfinite(tokens).all())


@pytest.mark.parametrize("size", [(40, 32), (32, 40), (0, 32)])
def test_sizes_off_the_grid_are_refused(params, size):
    with pytest.raises(ValueError, match=rf"{size[0]}x{size[1]} pixels; DINOv3 needs multiples of 16"):
        encode(params, jnp.zeros((1, *size, 3)), CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "dinov2"}, "model_type"),
        ({"num_channels": 4}, "num_channels"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"hidden_size": 36}, "width is 36"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_register_tokens": -1}, "num_register_tokens is -1"),
    ],
)
def test_config_json_that_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        DINOv3Config.from_json(PUBLISHED | change)


def test_sharded_over_the_batch_equals_unsharded(params):
    if jax.device_count() < 2:
        pytest.skip("one device")
    mesh = jax.sharding.Mesh(jax.devices()[:2], "data")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    sharded = encode_tokens(params, jax.device_put(PIXELS, sharding), CONFIG)
    assert sharded.sharding.is_equivalent_to(sharding, 3)
    assert relative_error(sharded, TOKENS) <= 1e-5
