"""Verifies the VAE, UMT5 and DINOv3 against a folder of values; whichever of the three is there.

Arrays are in PyTorch layout, channels second.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from refalign_jax.config import DType
from refalign_jax.convert.files import open_weights
from refalign_jax.encoders.dinov3 import load_dinov3
from refalign_jax.encoders.umt5 import load_umt5
from refalign_jax.encoders.wan_vae import load_vae
from refalign_jax.models import dinov3, umt5, vae
from refalign_jax.types import Params
from refalign_jax.verify.report import Report

FILES = ("vae.safetensors", "umt5.safetensors", "dinov3.safetensors")
"""Weights that make a folder one of encoders."""

_KNOWN = {
    "vae_latents",
    "vae_decoded",
    "vae_image_latents",
    "t5_embeddings",
    "dino_tokens",
}
_INPUTS = {"vae_video", "vae_latent_mean", "vae_latent_std", "t5_ids", "t5_mask", "dino_pixels"}


class EncodersCheck:
    """One folder opened, and the comparisons over it."""

    def __init__(self, folder: Path, config: Mapping[str, Any], compute_dtype: DType, report: Report) -> None:
        """Reads the values."""
        self.folder, self.json, self.dtype, self.report = folder, config, compute_dtype, report
        with np.load(folder / "values.npz") as file:
            self.values = {name: file[name] for name in file.files}

    def run(self) -> None:
        """Compares all that is there and remarks on names that are not known or belong to nothing."""
        checks = {"vae": self._vae, "umt5": self._umt5, "dinov3": self._dinov3}
        there = [name for name in checks if (self.folder / f"{name}.safetensors").is_file()]
        for name in tqdm(there, desc="verify", unit="encoder"):
            checks[name]()
        compared = {row.name for row in self.report.rows}
        for name in self.values:
            if name in _KNOWN and name not in compared:
                self.report.remarks.append(f"{name} was not compared: what it belongs to is not in the folder.")
            elif name not in _KNOWN | _INPUTS:
                self.report.remarks.append(f"values.npz holds {name!r}, which is none of the names verified.")

    def _need(self, name: str) -> np.ndarray:
        if name not in self.values:
            raise ValueError(f"{self.folder / 'values.npz'} lacks {name!r}, which the values in it depend on.")
        return self.values[name]

    def _sizes(self, name: str) -> Mapping[str, Any]:
        if name not in self.json:
            raise ValueError(f"{self.folder / 'config.json'} lacks {name!r}, the sizes of {name}.safetensors.")
        return self.json[name]

    def _compare(self, name: str, ours: jax.Array, kind: Any = "forward") -> None:
        if name in self.values:
            theirs = self.values[name]
            mine = np.asarray(ours, np.float32)
            self.report.compare(name, np.moveaxis(mine, -1, 1) if theirs.ndim == 5 else mine, theirs, kind)

    def _vae(self) -> None:
        """Encodes the video, its first frame alone, and decodes the published latents."""
        config = self._vae_config()
        params = _device(load_vae(config, open_weights(self.folder / "vae.safetensors")))
        encode, decode = (jax.jit(functools.partial(f, config=config)) for f in (vae.encode, vae.decode))
        if "vae_latents" in self.values or "vae_image_latents" in self.values:
            video = jnp.moveaxis(jnp.asarray(self._need("vae_video")), 1, -1)
            self._compare("vae_latents", encode(params, video))
            self._compare("vae_image_latents", encode(params, video[:, :1]))
        if "vae_decoded" in self.values:
            latents = jnp.moveaxis(jnp.asarray(self._need("vae_latents")), 1, -1)
            self._compare("vae_decoded", decode(params, latents), "decode")

    def _vae_config(self) -> vae.VAEConfig:
        sizes = self._sizes("vae")
        statistics = {
            f"latent_{part}": tuple(self.values[f"vae_latent_{part}"].tolist())
            for part in ("mean", "std")
            if f"vae_latent_{part}" in self.values
        }
        try:
            return vae.VAEConfig(
                width=sizes["dim"],
                latent_channels=sizes["z_dim"],
                width_multipliers=tuple(sizes["dim_mult"]),
                num_res_blocks=sizes["num_res_blocks"],
                temporal_downsample=tuple(sizes["temporal_downsample"]),
                compute_dtype=self.dtype,
                **statistics,
            )
        except KeyError as error:
            raise ValueError(f"{self.folder / 'config.json'}: 'vae' lacks {error}.") from error

    def _umt5(self) -> None:
        """Embeds the tokens; every row is compared, padding too, since the encoder computes it."""
        sizes = self._sizes("umt5")
        try:
            config = umt5.UMT5Config(
                vocab_size=sizes["vocab"],
                width=sizes["dim"],
                attention_width=sizes["dim_attn"],
                ffn_width=sizes["dim_ffn"],
                num_heads=sizes["num_heads"],
                num_layers=sizes["num_layers"],
                num_buckets=sizes["num_buckets"],
                compute_dtype=self.dtype,
            )
        except KeyError as error:
            raise ValueError(f"{self.folder / 'config.json'}: 'umt5' lacks {error}.") from error
        ids, mask = (jnp.asarray(self._need(f"t5_{part}"), jnp.int32) for part in ("ids", "mask"))
        params = _device(load_umt5(config, open_weights(self.folder / "umt5.safetensors")))
        embeddings: Any = jax.jit(umt5.UMT5Encoder(config).apply)({"params": params}, ids, mask)
        self._compare("t5_embeddings", embeddings)

    def _dinov3(self) -> None:
        """All tokens of normalised pixels: CLS, registers, patches."""
        path = self.folder / "dinov3.json"
        if not path.is_file():
            raise ValueError(f"{self.folder} lacks dinov3.json, the config.json that transformers writes.")
        config = dinov3.DINOv3Config.from_json(json.loads(path.read_text(encoding="utf-8")), self.dtype)
        pixels = jnp.moveaxis(jnp.asarray(self._need("dino_pixels")), 1, -1)
        params = _device(load_dinov3(config, open_weights(self.folder / "dinov3.safetensors")))
        self._compare("dino_tokens", dinov3.encode_tokens(params, pixels, config))


def _device(params: Params) -> Params:
    return jax.tree.map(jnp.asarray, params)
