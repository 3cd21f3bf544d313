"""DINOv3 against transformers' DINOv3ViTModel, live."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from refalign_jax.convert.dinov3 import dinov3_layers, dinov3_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import check, published_shapes
from refalign_jax.encoders.vit import load_dinov3
from refalign_jax.models import dinov3
from refalign_jax.models.vit import PUBLISHED_FIELDS

GATED = {"use_gated_mlp": True, "hidden_act": "silu"}


def shapes_of(config):
    return jax.eval_shape(lambda: dinov3.init(config, jax.random.key(0)))


def random_model(published):
    """Their model with weights, biases and scales that all matter, in evaluation mode."""
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(published).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            near_one = ("norm" in name and name.endswith("weight")) or "layer_scale" in name
            parameter.normal_(1.0 if near_one else 0.0, 0.2 if parameter.ndim == 1 else 0.05)
    return model


@pytest.mark.parametrize(
    ("options", "height", "width"),
    [
        ({"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 3}, 64, 64),
        ({"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4}, 48, 208),
        ({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | GATED, 160, 32),
        (
            {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "query_bias": False}
            | {"value_bias": False, "key_bias": True, "proj_bias": False, "mlp_bias": False, "rope_theta": 30.0}
            | {"layer_norm_eps": 1e-3, "num_register_tokens": 0}
            | GATED,
            32,
            96,
        ),
        (
            {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
            240,
            416,
        ),
    ],
    ids=["square", "wide", "gated-tall", "other-options", "vit-b16-240x416"],
)
def test_encode_equals_transformers(tmp_path, options, height, width):
    published = transformers.DINOv3ViTConfig(**{"num_register_tokens": 4} | options)
    theirs = random_model(published)
    theirs.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).uniform(-1, 1, (2 if height < 240 else 1, height, width, 3)).astype(np.float32)
    mean = np.asarray(transformers.image_utils.IMAGENET_DEFAULT_MEAN, np.float32)
    std = np.asarray(transformers.image_utils.IMAGENET_DEFAULT_STD, np.float32)
    normalised = torch.from_numpy((((pixels + 1) / 2 - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.inference_mode():
        expected = theirs(normalised).last_hidden_state[:, 1 + published.num_register_tokens :].numpy()

    config = dinov3.DINOv3Config.from_json(published.to_dict())
    params = load_dinov3(config, open_weights(tmp_path))
    ours = np.asarray(dinov3.encode(params, pixels, config))
    assert ours.shape == (len(pixels), height // 16, width // 16, config.width)
    assert np.linalg.norm(ours.reshape(expected.shape) - expected) / np.linalg.norm(expected) <= 1e-5


@pytest.mark.parametrize(
    "name", ["VIT_S16", "VIT_S16_PLUS", "VIT_B16", "VIT_L16", "VIT_H16_PLUS", "VIT_7B16"], ids=str.lower
)
def test_presets_have_the_names_and_shapes_of_transformers(name):
    config = getattr(dinov3, name)
    sizes = {key: getattr(config, ours) for ours, key in PUBLISHED_FIELDS.items()}
    options = {key: value for key, value in dataclasses.asdict(config).items() if key not in PUBLISHED_FIELDS}
    del options["compute_dtype"]
    published = transformers.DINOv3ViTConfig(**sizes, **options)
    assert dinov3.DINOv3Config.from_json(published.to_dict()) == config
    with torch.device("meta"):
        model = transformers.DINOv3ViTModel(published)
    found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    check(published_shapes(dinov3_table(config, dinov3_layers(found)), shapes_of(config)), found, name)
