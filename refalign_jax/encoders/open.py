"""The frozen networks that turn pixels and words into what the DiT trains on, behind three small interfaces.

Each is chosen by name: a stand-in of `stand_ins` (`dct`, `words`, `daisy`), or the folder or file of published weights.
Nothing is chosen by default. What `describe` returns goes into the dataset's manifest, and `reopen_video_codec` makes
the codec from it again, to decode what was sampled.

Networks run in JAX over all devices present: parameters on each, batches split between them, every call padded to one
size so that it compiles once a shape.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import ComputeDtype
from refalign_jax.convert.dinov3 import dinov3_layers, dinov3_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.pickle_files import open_pickle_weights
from refalign_jax.convert.table import Tensors, to_ours
from refalign_jax.convert.umt5 import umt5_names, umt5_table, untied
from refalign_jax.convert.vae import vae_table
from refalign_jax.encoders.stand_ins import DAISY, DCTCodec, WordHashes
from refalign_jax.models import dinov3, umt5, vae
from refalign_jax.models.streaming import Tiling
from refalign_jax.types import Float, Params


class VideoCodec(Protocol):
    """Videos to latents and back, causal in time: the first frame alone, then groups of four."""

    stride: int
    """Pixels a latent cell spans along rows and along columns."""
    channels: int
    """C."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that says which codec this is."""
        ...

    def encode(self, videos: Float[np.ndarray, "B T h w 3"]) -> Float[np.ndarray, "B F H W C"]:
        """Encodes videos, or images as videos of one frame.

        Args:
          videos: RGB in [-1, 1], T = 4k+1 frames, rows and columns multiples of `stride`.

        Returns:
          Normalised latents of about unit variance, float32, F = k+1.

        Raises:
          ValueError: another number of frames, or size.
        """
        ...

    def decode(self, latents: Float[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B T h w 3"]:
        """Decodes normalised latents into RGB, float32, mostly in [-1, 1] and not clipped to it; T = 4(F−1)+1.

        Raises:
          ValueError: another number of channels.
        """
        ...


class TextEncoder(Protocol):
    """Prompts to embeddings."""

    width: int
    """Of an embedding."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that says which encoder this is."""
        ...

    def encode(self, prompts: Sequence[str]) -> list[Float[np.ndarray, "S width"]]:
        """Embeds prompts, each without padding, float32, 1 ≤ S ≤ 512; the empty prompt has an embedding too."""
        ...


class FeatureEncoder(Protocol):
    """Images to features on a grid of patches."""

    patch_size: int
    """Side of a patch in pixels; twice the codec's stride, so that VFM tokens and the DiT's coincide."""
    width: int
    """E."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that says which encoder this is."""
        ...

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Describes each patch of images, RGB in [-1, 1]; float32.

        Raises:
          ValueError: rows or columns are not multiples of `patch_size`.
        """
        ...


def open_video_codec(
    choice: str,
    *,
    dct_stride: int = 8,
    dct_channels: int = 16,
    compute_dtype: ComputeDtype = "bfloat16",
    batch_size: int = 1,
    tile: int = 0,
) -> VideoCodec:
    """Opens the video codec.

    Args:
      choice: `dct`, or where Wan2.1's VAE is: a `.pth` or safetensors file, or a folder as Wan2.1 or diffusers
        publish it.
      dct_stride: of the DCT codec, 4 or 8.
      dct_channels: of the DCT codec.
      compute_dtype: of the VAE.
      batch_size: videos a call, rounded up to a multiple of the devices.
      tile: side in pixels of the VAE's tiles, overlapping by a quarter; 0 does without.

    Raises:
      ValueError: no such choice, or a file that is not whole or not this model's.
    """
    if choice == "dct":
        return DCTCodec(dct_stride, dct_channels)
    return WanVAE(_located(choice, "--vae", "dct"), compute_dtype, batch_size, tile)


def reopen_video_codec(described: Mapping[str, Any], batch_size: int = 1) -> VideoCodec:
    """Opens the codec that a dataset was made with.

    Args:
      described: what its `describe` returned, as manifests keep it under made/encoders/video.
      batch_size: as of `open_video_codec`.

    Raises:
      ValueError: its weights are gone.
    """
    if described["name"] == "dct":
        return DCTCodec(described["stride"], described["channels"])
    path = _located(described["path"], "--vae", "dct")
    return WanVAE(path, described["config"]["compute_dtype"], batch_size, described["tile"])


def open_text_encoder(
    choice: str, *, word_width: int = 256, compute_dtype: ComputeDtype = "bfloat16", batch_size: int = 1
) -> TextEncoder:
    """Opens the text encoder.

    Args:
      choice: `words`, or where UMT5 and its tokenizer are: a folder as Wan2.1 or diffusers publish it.
      word_width: of the word hashes.
      compute_dtype: of UMT5.
      batch_size: prompts a call, rounded up to a multiple of the devices.

    Raises:
      ValueError: no such choice, or a file that is not whole or not this model's.
    """
    if choice == "words":
        return WordHashes(word_width)
    return UMT5(_located(choice, "--text-encoder", "words"), compute_dtype, batch_size)


def reopen_text_encoder(described: Mapping[str, Any], batch_size: int = 1) -> TextEncoder:
    """Opens the text encoder that a dataset was made with; arguments and errors as of `reopen_video_codec`."""
    if described["name"] == "words":
        return WordHashes(described["width"])
    path = _located(described["path"], "--text-encoder", "words")
    return UMT5(path, described["compute_dtype"], batch_size)


def open_feature_encoder(
    choice: str, *, patch_size: int = 16, compute_dtype: ComputeDtype = "bfloat16", batch_size: int = 1
) -> FeatureEncoder:
    """Opens the VFM.

    Args:
      choice: `daisy`, or where DINOv3 is: a folder with its config.json and weights.
      patch_size: of DAISY.
      compute_dtype: of DINOv3.
      batch_size: images a call, rounded up to a multiple of the devices.

    Raises:
      ValueError: no such choice, or a file that is not whole or not this model's.
    """
    if choice == "daisy":
        return DAISY(patch_size)
    return DINOv3(_located(choice, "--vfm", "daisy"), compute_dtype, batch_size)


_vae_encode = jax.jit(vae.encode, static_argnames=("config", "tiling"))
_vae_decode = jax.jit(vae.decode, static_argnames=("config", "tiling"))


class WanVAE:
    """Wan2.1's VAE as a `VideoCodec`.

    Sizes come from a `config.json` in diffusers' form beside the weights, else they are Wan2.1's with the width read
    off the weights.
    """

    def __init__(self, path: Path, compute_dtype: ComputeDtype, batch_size: int, tile: int) -> None:
        file = _find(path, ("Wan2.1_VAE.pth", "vae", "."))
        opened = _open(file)
        self._config = _vae_config(file, opened, compute_dtype)
        self._tiling = Tiling(size=tile, overlap=tile // 4) if tile else None
        self.stride, self.channels = self._config.spatial_factor, self._config.latent_channels
        names: Literal["wan", "diffusers"] = "diffusers" if "quant_conv.weight" in opened.shapes else "wan"
        shapes = jax.eval_shape(lambda: vae.init(jax.random.key(0), self._config))
        self._params = _replicate(to_ours(vae_table(self._config, names), shapes, opened))
        self._batch_size, self._path = batch_size, path

    def describe(self) -> dict[str, Any]:
        """Returns what makes this codec again."""
        config = {
            "width": self._config.width,
            "latent_channels": self._config.latent_channels,
            "compute_dtype": self._config.compute_dtype,
        }
        tile = self._tiling.size if self._tiling else 0
        return {"name": "wan_vae", "path": str(self._path), "config": config, "stride": self.stride, "tile": tile}

    def encode(self, videos: Float[np.ndarray, "B T h w 3"]) -> Float[np.ndarray, "B F H W C"]:
        """Encodes as `VideoCodec.encode` says."""
        return _in_batches(
            lambda x: _vae_encode(self._params, x, config=self._config, tiling=self._tiling), videos, self._batch_size
        )

    def decode(self, latents: Float[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B T h w 3"]:
        """Decodes as `VideoCodec.decode` says."""
        return _in_batches(
            lambda z: _vae_decode(self._params, z, config=self._config, tiling=self._tiling), latents, self._batch_size
        )


class UMT5:
    """UMT5 as a `TextEncoder`; its sizes are read off the weights."""

    def __init__(self, path: Path, compute_dtype: ComputeDtype, batch_size: int) -> None:
        opened = _open(_find(path, ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder", ".")))
        names = umt5_names(opened.shapes)
        opened = untied(opened) if names == "transformers" else opened
        self._config = _umt5_config(opened, names, compute_dtype)
        self.width = self._config.width
        tokens = jnp.zeros((1, 1), jnp.int32)
        shapes = jax.eval_shape(umt5.UMT5Encoder(self._config).init, jax.random.key(0), tokens, tokens)["params"]
        self._tokenizer = umt5.load_tokenizer(_tokenizer_folder(path))
        self._params = _replicate(to_ours(umt5_table(self._config, names), shapes, opened))
        self._batch_size, self._path = batch_size, path

    def describe(self) -> dict[str, Any]:
        """Returns what tells this encoder from others."""
        dtype = self._config.compute_dtype
        return {"name": "umt5", "path": str(self._path), "width": self.width, "compute_dtype": dtype}

    def encode(self, prompts: Sequence[str]) -> list[Float[np.ndarray, "S width"]]:
        """Encodes as `TextEncoder.encode` says."""
        size, sharding = _device_batch(self._batch_size)
        rows: list[np.ndarray] = []
        for start in range(0, len(prompts), size):
            part = list(prompts[start : start + size])
            padded = part + [""] * (size - len(part))
            embeddings, lengths = umt5.encode_prompts(
                self._params, padded, self._tokenizer, self._config, sharding=sharding
            )
            rows += [row[:length] for row, length in zip(np.asarray(embeddings), lengths, strict=True)][: len(part)]
        return rows


class DINOv3:
    """DINOv3 as a `FeatureEncoder`."""

    def __init__(self, path: Path, compute_dtype: ComputeDtype, batch_size: int) -> None:
        file = _find(path, (".",))
        published = _read_json(file if file.is_dir() else file.parent)
        if published is None:
            raise ValueError(f"{path} has no config.json; DINOv3's sizes are read from it.")
        self._config = dinov3.DINOv3Config.from_json(published, compute_dtype)
        self.patch_size, self.width = self._config.patch_size, self._config.width
        opened = _open(file)
        pixels = jnp.zeros((1, self.patch_size, self.patch_size, 3))
        shapes = jax.eval_shape(dinov3.DINOv3(self._config).init, jax.random.key(0), pixels)["params"]
        table = dinov3_table(self._config, dinov3_layers(opened.shapes))
        self._params = _replicate(to_ours(table, shapes, opened))
        self._batch_size, self._path = batch_size, path

    def describe(self) -> dict[str, Any]:
        """Returns what tells this encoder from others."""
        return {
            "name": "dinov3",
            "path": str(self._path),
            "patch_size": self.patch_size,
            "width": self.width,
            "num_layers": self._config.num_layers,
            "compute_dtype": self._config.compute_dtype,
        }

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Encodes as `FeatureEncoder.encode` says."""
        return _in_batches(lambda x: dinov3.encode(self._params, x, self._config), images, self._batch_size)


def _located(choice: str, flag: str, stand_in: str) -> Path:
    """The path that a choice names."""
    path = Path(choice)
    if not choice or not path.exists():
        raise ValueError(f"{flag} is {choice!r}; give the folder or file of published weights, or {stand_in}.")
    return path


def _find(path: Path, candidates: Sequence[str]) -> Path:
    """The first of the candidates that a folder has; a file stands for itself."""
    if path.is_file():
        return path
    return next(path / name for name in candidates if (path / name).exists())


def _open(path: Path) -> Tensors:
    """Opens a torch checkpoint, safetensors, or a folder that holds either."""
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        found = sorted(path.glob("*.pth"))
        if len(found) == 1:
            path = found[0]
    return open_pickle_weights(path) if path.suffix in (".pth", ".pt", ".bin") else open_weights(path)


def _read_json(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, or None."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(published, dict):
        raise ValueError(f"{path} holds a {type(published).__name__}, not an object.")
    return published


_DIFFUSERS = {
    "base_dim": "width",
    "z_dim": "latent_channels",
    "dim_mult": "width_multipliers",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latent_mean",
    "latents_std": "latent_std",
}
"""Fields of AutoencoderKLWan's config.json, spelt as there, and of VAEConfig."""


def _vae_config(file: Path, opened: Tensors, compute_dtype: ComputeDtype) -> vae.VAEConfig:
    """Sizes from diffusers' config.json, else from the weights."""
    published = _read_json(file if file.is_dir() else file.parent) or {}
    if published.get("_class_name") == "AutoencoderKLWan":
        values = {ours: published[theirs] for theirs, ours in _DIFFUSERS.items() if theirs in published}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return vae.VAEConfig(**values, compute_dtype=compute_dtype)
    first = next(
        (opened.shapes[n] for n in ("encoder.conv1.weight", "encoder.conv_in.weight") if n in opened.shapes), None
    )
    if first is None:
        raise ValueError(f"{opened.source} does not hold Wan2.1's VAE: it has no encoder.conv1.weight.")
    return vae.VAEConfig(width=first[0], compute_dtype=compute_dtype)


def _umt5_config(
    opened: Tensors, names: Literal["wan", "transformers"], compute_dtype: ComputeDtype
) -> umt5.UMT5Config:
    """Sizes from the shapes of the first block."""
    first = {
        entry.path: opened.shapes.get(entry.names[0]) for entry in umt5_table(umt5.UMT5Config(num_layers=1), names)
    }
    lacking = [path for path, shape in first.items() if shape is None]
    if lacking:
        raise ValueError(f"{opened.source} does not hold a UMT5 encoder: it lacks {lacking[0]} under either name.")
    layers = umt5_table(umt5.UMT5Config(num_layers=1), names)[-1].name
    shapes = {path: shape for path, shape in first.items() if shape is not None}
    buckets, heads = shapes["blocks/position_bias"]
    return umt5.UMT5Config(
        vocab_size=shapes["token_embedding"][0],
        width=shapes["token_embedding"][1],
        attention_width=shapes["blocks/query/kernel"][0],
        ffn_width=shapes["blocks/ffn_in/kernel"][0],
        num_heads=heads,
        num_layers=sum(layers.format(i=i) in opened.shapes for i in range(1000)),
        num_buckets=buckets,
        compute_dtype=compute_dtype,
    )


def _tokenizer_folder(path: Path) -> Path:
    """Where the tokenizer lies, given UMT5's folder or file: in it, in one of its folders, or beside it."""
    folder = path if path.is_dir() else path.parent
    for place in (folder / "google" / "umt5-xxl", folder / "tokenizer", folder, folder.parent / "tokenizer"):
        if any((place / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer_config.json")):
            return place
    raise ValueError(f"{path} has no tokenizer; put tokenizer.json or spiece.model into {folder / 'tokenizer'}.")


def _mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.local_devices()), ("batch",))


def _replicate(params: Params) -> Params:
    """Puts parameters whole on every local device."""
    return jax.device_put(params, jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec()))


def _device_batch(batch_size: int) -> tuple[int, jax.sharding.Sharding]:
    """The batch size rounded up to a multiple of the local devices, and how a batch lies on them."""
    devices = jax.local_device_count()
    sharding = jax.sharding.NamedSharding(_mesh(), jax.sharding.PartitionSpec("batch"))
    return math.ceil(batch_size / devices) * devices, sharding


def _in_batches(run: Callable[[jax.Array], jax.Array], rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Runs rows in batches of one size, the last padded with zeros, split over the local devices."""
    size, sharding = _device_batch(batch_size)
    parts = []
    for start in range(0, len(rows), size):
        part = np.asarray(rows[start : start + size], np.float32)
        padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
        parts.append(np.asarray(run(jax.device_put(padded, sharding)))[: len(part)])
    return np.concatenate(parts)
