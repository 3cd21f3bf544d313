"""The networks behind their interfaces, from published files in each of their forms."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.footage import SUBJECTS, panned

from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_published
from refalign_jax.convert.vae import vae_table
from refalign_jax.convert.write import write_weights
from refalign_jax.data.video import to_float
from refalign_jax.digests import Digests
from refalign_jax.encoders.open import (
    open_feature_encoder,
    open_text_encoder,
    open_video_codec,
    reopen_video_codec,
    weights_digests,
)
from refalign_jax.encoders.wan_vae import load_vae
from refalign_jax.models import vae
from refalign_jax.models.vit import IMAGENET_MEAN, IMAGENET_STD

WEIGHTS = Path(__file__).parents[1] / "golden" / "encoders_a"


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def golden(name):
    """A golden array, channels last."""
    with np.load(WEIGHTS / "values.npz") as values:
        return np.moveaxis(values[name], 1, -1)


def test_the_vae_from_a_file_and_as_diffusers_ships_it(tmp_path):
    codec = open_video_codec(str(WEIGHTS / "vae.safetensors"), compute_dtype="float32", batch_size=2)
    assert (codec.stride, codec.channels) == (8, 16)
    images = golden("vae_video")[:, :1]
    more = np.concatenate([np.zeros_like(images)] * 8 + [images])  # in two batches on the eight devices
    assert relative(codec.encode(more)[8:], golden("vae_image_latents")) < 1e-5
    assert reopen_video_codec(json.loads(json.dumps(codec.describe()))).describe() == codec.describe()

    config = vae.VAEConfig(width=4)
    params = load_vae(config, open_weights(WEIGHTS / "vae.safetensors"))
    tensors = dict(to_published(vae_table(config, "diffusers"), params))
    folder = tmp_path / "vae"
    folder.mkdir()
    written = {name: value.shape for name, value in tensors.items()}
    write_weights(folder / "w.safetensors", tensors.items(), written, {n: v.dtype for n, v in tensors.items()})
    published = {"_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 4, 4]}
    (folder / "config.json").write_text(json.dumps(published | {"temperal_downsample": [False, True, True]}))
    codec = open_video_codec(str(tmp_path), compute_dtype="float32", batch_size=2)
    assert relative(codec.encode(images), golden("vae_image_latents")) < 1e-5
    assert relative(codec.decode(golden("vae_latents")[:, :1]), golden("vae_decoded")[:, :1]) < 1e-4


@pytest.fixture
def text_folder(tmp_path):
    """Weights and a tokenizer where Wan2.1 has them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", "a", "cat", "dog"]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(tmp_path / "google" / "umt5-xxl")
    shutil.copy(WEIGHTS / "umt5.safetensors", tmp_path)
    return tmp_path


def test_umt5_with_its_tokenizer(text_folder):
    encoder = open_text_encoder(str(text_folder), compute_dtype="float32", batch_size=2)
    rows = encoder.encode(["a cat", "", "a dog a cat"])
    assert [len(row) for row in rows] == [3, 1, 5]
    assert encoder.width == rows[0].shape[1] == 32
    (alone,) = encoder.encode(["a dog a cat"])
    np.testing.assert_allclose(rows[2], alone, rtol=1e-5, atol=1e-6)
    assert np.abs(rows[0][0] - rows[2][0]).max() > 1e-3  # attention to what follows
    assert encoder.describe()["width"] == 32
    shutil.rmtree(text_folder / "google")
    with pytest.raises(ValueError, match=r"has no tokenizer; put tokenizer.json or spiece.model into"):
        open_text_encoder(str(text_folder))


def test_umt5_with_quantised_weights(text_folder):
    exact = open_text_encoder(str(text_folder), compute_dtype="float32")
    quantised = open_text_encoder(str(text_folder), compute_dtype="float32", quantised="int8")
    assert quantised.describe() == exact.describe() | {"weights_dtype": "int8"}
    (found,), (expected,) = quantised.encode(["a dog a cat"]), exact.encode(["a dog a cat"])
    assert 1e-4 < relative(found, expected) < 0.1


def test_a_tokenizer_outside_of_the_weights_is_digested_with_them(text_folder):
    for path in (text_folder, text_folder / "umt5.safetensors"):
        described = {"text": open_text_encoder(str(path), compute_dtype="float32").describe()}
        before = weights_digests(described, Digests(text_folder / "none"))
        tokenizer = text_folder / "google/umt5-xxl/tokenizer.json"
        content = tokenizer.read_bytes()
        tokenizer.write_bytes(content.replace(b"cat", b"cow"))
        assert weights_digests(described, Digests(text_folder / "none")) != before
        tokenizer.write_bytes(content)
        assert weights_digests(described, Digests(text_folder / "none")) == before


def test_dinov3_from_its_folder(tmp_path):
    shutil.copy(WEIGHTS / "dinov3.safetensors", tmp_path / "model.safetensors")
    shutil.copy(WEIGHTS / "dinov3.json", tmp_path / "config.json")
    encoder = open_feature_encoder(str(tmp_path), compute_dtype="float32", batch_size=2)
    images = np.stack([to_float(panned(name, 1)[0, :32, :48]) for name in SUBJECTS])
    features = encoder.encode(images)
    assert features.shape == (3, 2, 3, encoder.width)
    (alone,) = encoder.encode(images[2:])
    assert relative(features[2], alone) < 1e-5
    plain = (golden("dino_pixels") * IMAGENET_STD + np.array(IMAGENET_MEAN)) * 2 - 1
    expected = np.swapaxes(golden("dino_tokens"), 1, 2)[:, 5:]
    assert relative(encoder.encode(plain.astype(np.float32)).reshape(expected.shape), expected) < 1e-5
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        open_feature_encoder(str(tmp_path))
