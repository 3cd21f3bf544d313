"""The three interfaces: stand-ins by their properties, networks beside the models they wrap."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.footage import SUBJECTS, panned, photograph

from refalign_jax.convert.files import open_weights, write_weights
from refalign_jax.convert.table import to_ours, to_published
from refalign_jax.convert.vae import vae_table
from refalign_jax.data.video import to_float
from refalign_jax.encoders.open import open_feature_encoder, open_text_encoder, open_video_codec, reopen_video_codec
from refalign_jax.encoders.stand_ins import DAISY, DCTCodec, WordHashes
from refalign_jax.models import dinov3, vae

WEIGHTS = Path(__file__).parents[1] / "golden" / "encoders_a"


def videos(num_frames=9):
    return np.stack([to_float(panned(name, num_frames)) for name in SUBJECTS])


def psnr(a, b):
    return 10 * np.log10(4 / np.mean(np.square(a - b)))


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 40), st.integers(0, 3), st.integers(0, 9))
def test_dct_gives_back_every_latent(stride, channels, k, seed):
    codec = DCTCodec(stride, channels)
    latents = np.random.default_rng(seed).standard_normal((2, k + 1, 3, 2, channels)).astype(np.float32)
    video = codec.decode(latents)
    assert video.shape == (2, 4 * k + 1, 3 * stride, 2 * stride, 3)
    np.testing.assert_allclose(codec.encode(video), latents, atol=1e-4)


def test_dct_is_causal_in_the_geometry_of_the_vae():
    codec, video = DCTCodec(8, 16), videos()
    latents = codec.encode(video)
    assert latents.shape == (3, 3, 8, 12, 16)
    np.testing.assert_array_equal(codec.encode(video[:, :1]), latents[:, :1])
    np.testing.assert_array_equal(codec.encode(video[:, :5]), latents[:, :2])
    later = video.copy()
    later[:, 5:] = 0
    changed = np.abs(codec.encode(later) - latents).max((0, 2, 3, 4))
    assert changed[:2].tolist() == [0, 0]
    assert changed[2] > 1
    one = video.copy()
    one[:, :, 8:16, :8] = 0
    assert np.argwhere(np.abs(codec.encode(one) - latents).max((0, 1, 4)) > 0).tolist() == [[1, 0]]


def test_dct_of_a_still_video_agrees_between_first_and_later_frames():
    codec = DCTCodec(4, 16)
    still = to_float(photograph("cat"))[None, None].repeat(5, 1)
    first, later = codec.encode(still)[0]
    shared = [c for c in range(16) if np.corrcoef(first[..., c].ravel(), later[..., c].ravel())[0, 1] > 0.999]
    assert len(shared) >= 12  # channels of one frequency; the others are motion in one and detail in the other


def test_dct_keeps_what_matters_at_about_unit_variance():
    video = videos()
    for stride, quality in ((4, 21), (8, 18)):
        codec = DCTCodec(stride, 16)
        latents = codec.encode(video)
        deviations = np.sqrt(np.square(latents).mean((0, 1, 2, 3)))
        assert 0.1 < deviations.min() < deviations.max() < 2.5
        assert psnr(codec.decode(latents), video) > quality
    errors = [psnr(codec.decode(codec.encode(video)), video) for codec in (DCTCodec(4, n) for n in (2, 8, 16, 32, 48))]
    assert errors == sorted(errors)
    whole = DCTCodec(4, 48)
    np.testing.assert_allclose(whole.decode(whole.encode(video[:, :1])), video[:, :1], atol=1e-5)


def test_dct_is_made_again_from_its_description():
    codec = open_video_codec("dct", dct_stride=4, dct_channels=7)
    assert codec.describe() == {"name": "dct", "stride": 4, "channels": 7}
    again = reopen_video_codec(json.loads(json.dumps(codec.describe())))
    np.testing.assert_array_equal(again.encode(videos()), codec.encode(videos()))


def test_dct_refuses_what_it_can_not_do():
    for arguments, message in (
        ((16, 16), "stride is 16"),
        ((4, 49), "49 channels; with stride 4, 1 to 48"),
        ((4, 0), "0"),
    ):
        with pytest.raises(ValueError, match=message):
            DCTCodec(*arguments)
    for shape in ((1, 4, 8, 8, 3), (1, 5, 9, 8, 3)):
        with pytest.raises(ValueError, match=r"4k\+1 frames, sides multiples of 8"):
            DCTCodec().encode(np.zeros(shape))
    with pytest.raises(ValueError, match="5 channels"):
        DCTCodec().decode(np.zeros((1, 1, 2, 2, 5)))


def test_words_are_the_same_wherever_they_stand():
    encoder = WordHashes(64)
    (cat, walk, end), (dog, walk2, also, end2), (empty,), (marks,) = encoder.encode(
        ["Cat walks.", "dog walks, cat", "", " . "]
    )
    np.testing.assert_array_equal(cat, also)
    np.testing.assert_array_equal(walk, walk2)
    for other in (end2, empty, marks):
        np.testing.assert_array_equal(end, other)
    vectors = np.stack([cat, walk, dog, end])
    cosines = vectors @ vectors.T / 64
    assert np.abs(cosines - np.eye(4)).max() < 0.6
    many = np.concatenate(encoder.encode([" ".join(map(str, range(300)))]))
    assert many.shape == (301, 64)
    assert abs(many.mean()) < 0.03
    assert abs(many.std() - 1) < 0.03


def test_long_prompts_end_with_the_end_at_512():
    (rows,) = WordHashes(4).encode(["word " * 600])
    assert rows.shape == (512, 4)
    np.testing.assert_array_equal(rows[-1], WordHashes(4).encode([""])[0][0])


def test_daisy_lies_on_the_patches():
    daisy = DAISY(8)
    image = to_float(photograph("cat"))[None]
    features = daisy.encode(image)
    assert features.shape == (1, 12, 16, daisy.width)
    moved = daisy.encode(np.roll(image, (8, -16), (1, 2)))
    inside = np.abs(moved[0, 3:-2, 2:-4] - features[0, 2:-3, 4:-2])
    assert inside.mean() < 1e-3  # the smoothing sees a little of the border
    for dy, dx in ((0, 1), (1, 0)):  # and not half a patch beside them
        half = daisy.encode(np.roll(image, (4 * dy, 4 * dx), (1, 2)))
        assert np.abs(half - features).mean() > 0.01


def test_daisy_tells_subjects_apart_and_no_token_is_zero():
    daisy = DAISY(8)
    first, later = ([to_float(photograph(n)[16:80, x : x + 96])[None] for n in SUBJECTS] for x in (0, 8))
    tokens = [
        np.concatenate([daisy.encode(x)[0].reshape(-1, daisy.width) for x in images]) for images in (first, later)
    ]
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in tokens)
    subject = np.repeat(np.arange(len(SUBJECTS)), len(a) // len(SUBJECTS))
    assert (subject[(a @ b.T).argmax(0)] == subject).mean() > 0.9
    for grey in (-1, 0, 1):
        blank = daisy.encode(np.full((1, 16, 16, 3), grey, np.float32))
        assert np.linalg.norm(blank, axis=-1).min() > 0.09
    with pytest.raises(ValueError, match="multiples"):
        daisy.encode(np.zeros((1, 12, 16, 3)))


@pytest.mark.parametrize(
    ("call", "flag", "stand_in"),
    [
        (open_video_codec, "--vae", "dct"),
        (open_text_encoder, "--text-encoder", "words"),
        (open_feature_encoder, "--vfm", "daisy"),
    ],
)
def test_a_choice_that_is_none(call, flag, stand_in, tmp_path):
    for choice in ("", "dckt", str(tmp_path / "no")):
        with pytest.raises(ValueError, match=rf"^{flag} is '.*'; give the folder or file .*, or {stand_in}\.$"):
            call(choice)
    (tmp_path / "weights.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match=r"not a whole safetensors file|no config\.json"):
        call(str(tmp_path))


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
    shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), config))
    params = to_ours(vae_table(config), shapes, open_weights(WEIGHTS / "vae.safetensors"))
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


def test_weights_of_another_model():
    with pytest.raises(ValueError, match=r"does not hold a UMT5 encoder: it lacks token_embedding"):
        open_text_encoder(str(WEIGHTS / "vae.safetensors"))
    with pytest.raises(ValueError, match=r"does not hold Wan2.1's VAE"):
        open_video_codec(str(WEIGHTS / "umt5.safetensors"))


def test_dinov3_from_its_folder(tmp_path):
    shutil.copy(WEIGHTS / "dinov3.safetensors", tmp_path / "model.safetensors")
    shutil.copy(WEIGHTS / "dinov3.json", tmp_path / "config.json")
    encoder = open_feature_encoder(str(tmp_path), compute_dtype="float32", batch_size=2)
    images = videos(1)[:, 0, :32, :48]
    features = encoder.encode(images)
    assert features.shape == (3, 2, 3, encoder.width)
    (alone,) = encoder.encode(images[2:])
    assert relative(features[2], alone) < 1e-5
    plain = (golden("dino_pixels") * dinov3.IMAGENET_STD + np.array(dinov3.IMAGENET_MEAN)) * 2 - 1
    expected = np.swapaxes(golden("dino_tokens"), 1, 2)[:, 5:]
    assert relative(encoder.encode(plain.astype(np.float32)).reshape(expected.shape), expected) < 1e-5
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        open_feature_encoder(str(tmp_path))
