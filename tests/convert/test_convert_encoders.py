"""UMT5 and DINOv3 weights: published names of full-size files, round trips, tied embeddings."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from support.weight_files import write_safetensors

from refalign_jax.convert.dinov3 import dinov3_layers, dinov3_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import check, published_shapes, to_ours, to_published
from refalign_jax.convert.umt5 import TIED, umt5_names, umt5_table, untied
from refalign_jax.convert.write import write_weights
from refalign_jax.models import dinov3, umt5
from refalign_jax.models.umt5 import UMT5Config

GOLDEN = Path(__file__).parents[1] / "golden"
UMT5 = UMT5Config(vocab_size=256, width=32, attention_width=32, ffn_width=64, num_heads=4, num_layers=2)
DINO = dinov3.DINOv3Config.from_json(json.loads((GOLDEN / "encoders_a" / "dinov3.json").read_text()))


def umt5_shapes(config):
    return jax.eval_shape(lambda: umt5.init(config, jax.random.key(0)))


def dinov3_shapes(config):
    return jax.eval_shape(lambda: dinov3.init(config, jax.random.key(0)))


def manifest(name):
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / "manifests" / f"{name}.json").read_text()).items()}


def test_umt5_xxl_manifest():
    config = UMT5Config()
    check(published_shapes(umt5_table(config), umt5_shapes(config)), manifest("umt5_xxl_encoder"), "manifest")


@pytest.mark.parametrize(("name", "config"), [("dinov3_vitb16", dinov3.VIT_B16), ("dinov3_vitl16", dinov3.VIT_L16)])
def test_dinov3_manifests(name, config):
    check(published_shapes(dinov3_table(config), dinov3_shapes(config)), manifest(name), "manifest")


@pytest.mark.parametrize(
    ("config", "millions"),
    [
        (dinov3.VIT_S16, 21),
        (dinov3.VIT_S16_PLUS, 29),
        (dinov3.VIT_B16, 86),
        (dinov3.VIT_L16, 300),
        (dinov3.VIT_H16_PLUS, 840),
        (dinov3.VIT_7B16, 6716),
    ],
)
def test_dinov3_presets_have_the_published_size(config, millions):
    count = sum(leaf.size for leaf in jax.tree.leaves(dinov3_shapes(config)))
    assert count / 1e6 == pytest.approx(millions, rel=0.03)  # the paper rounds


@pytest.mark.parametrize(
    ("file", "table", "shapes"),
    [
        ("umt5", umt5_table(UMT5), umt5_shapes(UMT5)),
        ("dinov3", dinov3_table(DINO), dinov3_shapes(DINO)),
    ],
)
def test_round_trip_is_byte_equal(file, table, shapes):
    weights = open_weights(GOLDEN / "encoders_a" / f"{file}.safetensors")
    written = dict(to_published(table, to_ours(table, shapes, weights)))
    assert written.keys() == weights.shapes.keys()
    for name, value in written.items():
        assert value.tobytes() == weights.read(name).tobytes(), name


def test_names_in_the_wild_are_told_apart():
    for layers in ("layer", "model.layer"):
        assert dinov3_layers(published_shapes(dinov3_table(DINO, layers), dinov3_shapes(DINO))) == layers
    for names in ("wan", "transformers"):
        assert umt5_names(published_shapes(umt5_table(UMT5, names), umt5_shapes(UMT5))) == names


def test_names_of_the_hub_load_the_same_numbers(tmp_path):
    weights = open_weights(GOLDEN / "encoders_a" / "dinov3.safetensors")
    params = to_ours(dinov3_table(DINO), dinov3_shapes(DINO), weights)
    renamed = dict(to_published(dinov3_table(DINO, "layer"), params))
    assert {name.removeprefix("model.") for name in weights.shapes} == renamed.keys()
    again = to_ours(dinov3_table(DINO, "layer"), dinov3_shapes(DINO), _written(tmp_path / "hub.safetensors", renamed))
    jax.tree.map(np.testing.assert_array_equal, params, again)


def _written(path, tensors):
    shapes = {name: value.shape for name, value in tensors.items()}
    write_weights(path, tensors.items(), shapes, {name: value.dtype for name, value in tensors.items()})
    return open_weights(path)


@pytest.mark.parametrize("embedding", ["shared", "tied", "both"])
def test_transformers_names_load_the_same_numbers(tmp_path, embedding):
    params = to_ours(umt5_table(UMT5), umt5_shapes(UMT5), open_weights(GOLDEN / "encoders_a" / "umt5.safetensors"))
    tensors = dict(to_published(umt5_table(UMT5, "transformers"), params))
    if embedding != "shared":
        tensors[TIED] = tensors["shared.weight"]
    if embedding == "tied":
        del tensors["shared.weight"]
    weights = untied(_written(tmp_path / "umt5.safetensors", tensors))
    again = to_ours(umt5_table(UMT5, "transformers"), umt5_shapes(UMT5), weights)
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_two_different_embeddings_are_refused(tmp_path):
    params = to_ours(umt5_table(UMT5), umt5_shapes(UMT5), open_weights(GOLDEN / "encoders_a" / "umt5.safetensors"))
    tensors = dict(to_published(umt5_table(UMT5, "transformers"), params))
    tensors[TIED] = tensors["shared.weight"] + 1
    with pytest.raises(ValueError, match="one token embedding"):
        untied(_written(tmp_path / "umt5.safetensors", tensors))


def test_a_missing_register_is_named():
    found = manifest("dinov3_vitb16")
    del found["embeddings.register_tokens"]
    with pytest.raises(ValueError, match=r"1 missing: embeddings.register_tokens \[1, 4, 768\]"):
        check(published_shapes(dinov3_table(dinov3.VIT_B16), dinov3_shapes(dinov3.VIT_B16)), found, "a file")


def test_comfyui_keeps_the_tokenizer_among_the_tensors(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    stored = {TIED: value.astype(ml_dtypes.float8_e4m3fn), "spiece_model": np.zeros(9, np.uint8)}
    scale = {"encoder.embed_tokens.scale_weight": np.array(0.5, np.float32)}
    weights = untied(open_weights(write_safetensors(tmp_path / "umt5.safetensors", stored | scale)))
    assert dict(weights.shapes) == {"shared.weight": (2, 3)}
    np.testing.assert_array_equal(weights.read("shared.weight"), value / 2)
