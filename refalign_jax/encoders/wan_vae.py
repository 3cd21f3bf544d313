"""Wan2.1's VAE as a `VideoCodec`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from refalign_jax.config import ComputeDtype
from refalign_jax.convert.files import open_weights, read_config
from refalign_jax.convert.other_models import refuse_other_vaes
from refalign_jax.convert.table import Tensors, read_stored, stored
from refalign_jax.convert.vae import vae_table
from refalign_jax.encoders.network import Resident, find_file, in_batches, replicate
from refalign_jax.models import vae
from refalign_jax.models.streaming import Tiling
from refalign_jax.types import Float, Params

_encode = jax.jit(vae.encode, static_argnames=("config", "tiling"))
_decode = jax.jit(vae.decode, static_argnames=("config", "tiling"))


class WanVAE:
    """Wan2.1's VAE, from weights under Wan2.1's names or diffusers'.

    Args:
      path: the file, or a folder as Wan2.1 or diffusers publish it.
      compute_dtype: dtype of the convolutions.
      batch_size: videos a call, rounded up to a multiple of the devices.
      tile: side in pixels of the tiles in which it works, overlapping by a quarter; 0 for whole frames.

    Raises:
      ValueError: a file that is not whole, or not this model's. The first `encode` or `decode` raises it for numbers
        that are not finite.
    """

    def __init__(self, path: Path, compute_dtype: ComputeDtype, batch_size: int, tile: int) -> None:
        file = find_file(path, ("Wan2.1_VAE.pth", "vae", "."))
        weights = open_weights(file)
        self._config = read_vae_config(file, weights, compute_dtype)
        self._tiling = Tiling(size=tile, overlap=tile // 4) if tile else None
        self.stride, self.channels = self._config.spatial_factor, self._config.latent_channels
        check_vae(self._config, weights)
        self._params = Resident(lambda: replicate(load_vae(self._config, weights)))
        self._batch_size, self._path = batch_size, path

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the codec."""
        config = {
            "width": self._config.width,
            "latent_channels": self._config.latent_channels,
            "compute_dtype": self._config.compute_dtype,
        }
        tile = self._tiling.size if self._tiling else 0
        return {"name": "wan_vae", "path": str(self._path), "config": config, "stride": self.stride, "tile": tile}

    def encode(self, videos: Float[np.ndarray, "B T h w 3"]) -> Float[np.ndarray, "B F H W C"]:
        """Encodes videos as `VideoCodec.encode` specifies."""
        return in_batches(
            lambda x: _encode(self._params(), x, config=self._config, tiling=self._tiling), videos, self._batch_size
        )

    def decode(self, latents: Float[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B T h w 3"]:
        """Decodes latents as `VideoCodec.decode` specifies."""
        return in_batches(
            lambda z: _decode(self._params(), z, config=self._config, tiling=self._tiling), latents, self._batch_size
        )

    def release(self) -> None:
        """Frees the parameters' memory, as `VideoCodec.release` specifies."""
        self._params.release()


_DIFFUSERS = {
    "base_dim": "width",
    "z_dim": "latent_channels",
    "dim_mult": "width_multipliers",
    "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample",
    "latents_mean": "latent_mean",
    "latents_std": "latent_std",
}
"""Fields of AutoencoderKLWan's config.json, spelt as there, and the fields of `VAEConfig` that they fill."""


def read_vae_config(file: Path, weights: Tensors, compute_dtype: ComputeDtype) -> vae.VAEConfig:
    """Reads the sizes from diffusers' config.json; without it they are Wan2.1's, with the width of the weights.

    Args:
      file: the weights' file or folder, beside or in which config.json is looked for.
      weights: what is in it.
      compute_dtype: dtype of the convolutions.

    Raises:
      ValueError: the weights are not this model's.
    """
    refuse_other_vaes(weights.shapes, weights.source)
    published = read_config(file) or {}
    if published.get("_class_name") == "AutoencoderKLWan":
        values = {ours: published[theirs] for theirs, ours in _DIFFUSERS.items() if theirs in published}
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return vae.VAEConfig(**values, compute_dtype=compute_dtype)
    first = next(
        (weights.shapes[n] for n in ("encoder.conv1.weight", "encoder.conv_in.weight") if n in weights.shapes), None
    )
    if first is None:
        raise ValueError(f"{weights.source} does not hold Wan2.1's VAE: it has no encoder.conv1.weight.")
    return vae.VAEConfig(width=first[0], compute_dtype=compute_dtype)


def check_vae(config: vae.VAEConfig, weights: Tensors) -> Params:
    """Finds the parameters, each a `table.Stored`, without reading them.

    Raises:
      ValueError: tensors that are missing, extra or misshapen, listed with their shapes.
    """
    names: Literal["wan", "diffusers"] = "diffusers" if "quant_conv.weight" in weights.shapes else "wan"
    shapes = jax.eval_shape(lambda: vae.init(config, jax.random.key(0)))
    return stored(vae_table(config, names), shapes, weights)


def load_vae(config: vae.VAEConfig, weights: Tensors) -> Params:
    """Reads the parameters as numpy arrays; arguments and errors as in `check_vae`."""
    return read_stored(check_vae(config, weights))
