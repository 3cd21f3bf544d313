"""The DCT codec: the VAE's geometry, round trips, and what is lost."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.footage import SUBJECTS, panned, photograph

from refalign_jax.data.video import to_float
from refalign_jax.encoders.dct import DCTCodec
from refalign_jax.encoders.open import open_video_codec, reopen_video_codec


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
    """Over all channels; coarse ones have more than fine ones."""
    video = videos()
    for stride, quality in ((4, 21), (8, 18)):
        codec = DCTCodec(stride, 16)
        latents = codec.encode(video)
        deviations = np.sqrt(np.square(latents).mean((0, 1, 2, 3)))
        assert 0.6 < np.sqrt(np.square(latents).mean()) < 1.4
        assert set(np.argsort(deviations)[-2:]) <= {0, 1, 14}  # grey and colour of a block; 14 is a motion
        assert 0.1 < deviations.min() < 1 < deviations.max() < 4
        assert psnr(codec.decode(latents), video) > quality
    errors = [psnr(codec.decode(codec.encode(video)), video) for codec in (DCTCodec(4, n) for n in (2, 8, 16, 32, 48))]
    assert errors == sorted(errors)
    whole = DCTCodec(4, 48)
    np.testing.assert_allclose(whole.decode(whole.encode(video[:, :1])), video[:, :1], atol=1e-5)


def test_dct_is_made_again_from_its_description():
    codec = open_video_codec("dct", dct_stride=4, dct_channels=7)
    assert codec.describe() == {"name": "dct", "version": 2, "stride": 4, "channels": 7}
    again = reopen_video_codec(json.loads(json.dumps(codec.describe())))
    np.testing.assert_array_equal(again.encode(videos()), codec.encode(videos()))


def test_latents_of_another_version_are_not_decoded():
    """They would look like a video."""
    with pytest.raises(ValueError, match=r"from version 1 of the codec dct, this is version 2, .* prepare the dataset"):
        reopen_video_codec({"name": "dct", "stride": 4, "channels": 7})


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
