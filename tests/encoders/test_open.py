"""Choices of encoders, and what is said of those that can't be opened."""

from pathlib import Path

import pytest

from refalign_jax.encoders.open import open_feature_encoder, open_text_encoder, open_video_codec

WEIGHTS = Path(__file__).parents[1] / "golden" / "encoders_a"


@pytest.mark.parametrize(
    ("call", "flag", "stand_in"),
    [
        (open_video_codec, "--vae", "dct"),
        (open_text_encoder, "--text-encoder", "words"),
        (open_feature_encoder, "--vfm", "daisy or efficientnet-lite0"),
    ],
)
def test_a_choice_that_is_none(call, flag, stand_in, tmp_path):
    for choice in ("", "dckt", str(tmp_path / "no")):
        with pytest.raises(
            ValueError,
            match=rf"^{flag} '.*' (names nothing|does not exist); give the folder or file .*, or {stand_in}\.$",
        ):
            call(choice)
    (tmp_path / "weights.safetensors").write_text("nothing")
    with pytest.raises(ValueError, match=r"not a whole safetensors file|no config\.json"):
        call(str(tmp_path))


def test_weights_of_another_model():
    with pytest.raises(ValueError, match=r"does not hold a UMT5 encoder: it lacks token_embedding"):
        open_text_encoder(str(WEIGHTS / "vae.safetensors"))
    with pytest.raises(ValueError, match=r"does not hold Wan2.1's VAE"):
        open_video_codec(str(WEIGHTS / "umt5.safetensors"))


def test_a_vfm_that_is_not_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(
        ValueError, match=r"model_type 'clip'; known are dinov3_vit, dinov2, dinov2_with_registers, siglip, .*"
    ):
        open_feature_encoder(str(tmp_path))
