"""DINOv2 and SigLIP2 against transformers' models, live: full architecture, random weights, two shapes each."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import vits

from refalign_jax.convert.dinov2 import dinov2_names, dinov2_table, ungated
from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.open import open_feature_encoder
from refalign_jax.encoders.vit import load_dinov2, load_siglip2
from refalign_jax.models import dinov2, siglip2
from refalign_jax.models.vit import resize

SHAPES = [(160, 272), (192, 96)]
"""Neither is square, so that rows and columns are told apart; the second is taller than wide."""
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}


def relative(ours, theirs):
    return np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs)


def saved(model, folder):
    """Saves a model; returns the published config.json."""
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
def test_dinov2_base(tmp_path, registers):
    theirs = vits.dinov2(registers)
    config = dinov2.DINOv2Config.from_json(saved(theirs, tmp_path))
    assert (config.num_layers, config.width, config.grid) == (12, 768, 37)
    params = load_dinov2(config, open_weights(tmp_path))
    for shape in SHAPES:
        pixels = vits.pixels_of(*shape)
        assert relative(dinov2.encode(params, pixels, config), vits.features(theirs, pixels)) <= 1e-5


@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
def test_siglip2_base(tmp_path, naflex):
    theirs = vits.siglip2(naflex)
    config = siglip2.SigLIP2Config.from_json(saved(theirs, tmp_path))
    assert (config.num_layers, config.width, config.grid) == (12, 768, 16)
    params = load_siglip2(config, open_weights(tmp_path))
    for shape in SHAPES:
        pixels = vits.pixels_of(*shape)
        assert relative(siglip2.encode(params, pixels, config), vits.features(theirs, pixels)) <= 1e-5


@pytest.mark.parametrize("registers", [False, True], ids=["plain", "registers"])
@pytest.mark.parametrize("gated", [False, True], ids=["mlp", "gated"])
@pytest.mark.parametrize("names", ["hub", "transformers"])
def test_dinov2_in_all_its_forms(tmp_path, registers, gated, names):
    """The giant's gated MLP, whose file joins two projections; files and state_dict name the attention differently."""
    theirs = vits.dinov2(registers, **SMALL, image_size=70, use_swiglu_ffn=gated, qkv_bias=not gated)
    published = saved(theirs, tmp_path)
    if names == "transformers":
        from safetensors.torch import save_file

        save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    encoder = open_feature_encoder(str(tmp_path), compute_dtype="float32", batch_size=2)
    pixels = vits.pixels_of(96, 64, count=3)
    assert relative(encoder.encode(pixels), vits.features(theirs, pixels)) <= 1e-5
    assert encoder.describe()["name"] == published["model_type"]
    assert dinov2_names(ungated(open_weights(tmp_path)).shapes) == names


@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
@pytest.mark.parametrize("whole", [False, True], ids=["vision", "whole"])
@pytest.mark.parametrize("patch", [14, 16])
def test_siglip2_in_all_its_forms(tmp_path, naflex, whole, patch):
    """The vision model alone, and the whole model with its text tower; patches of 14 pixels resize the image."""
    size = {"num_patches": 25} if naflex else {"image_size": 5 * patch}
    theirs = vits.siglip2(naflex, **SMALL, **size, intermediate_size=40, patch_size=patch)
    if whole:
        kind = "Siglip2" if naflex else "Siglip"
        text = {**SMALL, "vocab_size": 10, "intermediate_size": 40, "bos_token_id": 1, "eos_token_id": 2}
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=theirs.config.to_dict())
        model = getattr(transformers, f"{kind}Model")(config)
        model.vision_model.load_state_dict(theirs.state_dict())
    saved(model if whole else theirs, tmp_path)
    encoder = open_feature_encoder(str(tmp_path), compute_dtype="float32", batch_size=2)
    pixels = vits.pixels_of(96, 160, count=2)
    assert relative(encoder.encode(pixels), vits.features(theirs, pixels)) <= 1e-5
    assert encoder.describe()["name"] == "siglip2"


@pytest.mark.parametrize(
    ("method", "mode", "antialias"),
    [("bicubic", "bicubic", False), ("bicubic_antialias", "bicubic", True), ("bilinear_antialias", "bilinear", True)],
)
@pytest.mark.parametrize("size", [(30, 52), (3, 5), (16, 7)], ids=str)
def test_resize_equals_torch(method, mode, antialias, size):
    """Larger, smaller, and one axis as it is."""
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(x).permute(0, 3, 1, 2), size, mode=mode, antialias=antialias, align_corners=False
    )
    assert relative(resize(jnp.asarray(x), size, method), theirs.permute(0, 2, 3, 1).numpy()) <= 1e-5


def test_a_table_covers_the_published_names(tmp_path):
    """Each tensor of a file has its entry."""
    theirs = vits.dinov2(True, **SMALL, image_size=70)
    config = dinov2.DINOv2Config.from_json(saved(theirs, tmp_path))
    assert {name for entry in dinov2_table(config) for name in entry.names} == set(open_weights(tmp_path).shapes)
