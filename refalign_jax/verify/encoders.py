"""Verifies the VAE, UMT5 and DINOv3 against a folder of values: those of the three whose weights it has."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config import DType
from refalign_jax.convert.files import open_weights
from refalign_jax.data.json_lines import read_json
from refalign_jax.encoders.umt5 import load_umt5
from refalign_jax.encoders.vit import load_dinov3
from refalign_jax.encoders.wan_vae import load_vae
from refalign_jax.models import dinov3, umt5, vae
from refalign_jax.verify.progress import attempt, run_tasks
from refalign_jax.verify.report import Kind, Report
from refalign_jax.verify.values import Values, channels_second

VALUES = {
    "vae": ["vae_latents", "vae_decoded", "vae_image_latents"],
    "umt5": ["t5_embeddings"],
    "dinov3": ["dino_tokens"],
}
"""Names in values.npz that are compared, by encoder."""

KNOWN = {name for names in VALUES.values() for name in names}
"""All of them."""

INPUTS = {"vae_video", "vae_latent_mean", "vae_latent_std", "t5_ids", "t5_mask", "dino_pixels"}
"""Names in values.npz that others are computed from."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A folder of values of encoders.

    Attributes:
      values: inputs, and what the other framework computed from them.
      compute_dtype: dtype of our matrix products.
      report: receives the comparisons.
    """

    values: Values
    compute_dtype: DType
    report: Report

    def compare(self, name: str, ours: jax.Array, kind: Kind = "encode") -> None:
        """Compares a value, if the folder has it; videos in PyTorch layout."""
        if name in self.values.arrays:
            theirs, mine = self.values.arrays[name], ours.astype(jnp.float32)
            self.report.compare(name, channels_second(mine) if theirs.ndim == 5 else np.asarray(mine), theirs, kind)


def check_encoders(values: Values, compute_dtype: DType, report: Report) -> None:
    """Compares everything in a folder with weights of encoders.

    Args:
      values: the folder.
      compute_dtype: dtype of our matrix products.
      report: receives comparisons, and a remark on each name that is unknown or could not be compared.

    Raises:
      ValueError: config.json lacks an entry, weights are not those of their model, or an input is missing.
    """
    case = Case(values, compute_dtype, report)
    run_tasks(
        [
            (name, functools.partial(attempt, report, VALUES[name], functools.partial(check, case)))
            for name, check in CHECKS.items()
            if (values.folder / f"{name}.safetensors").is_file()
        ]
    )
    for name in values.arrays:
        if name in KNOWN:
            report.skip([name] if name not in report.skipped else [], "the weights of its encoder are missing")
        elif name not in INPUTS:
            report.remarks.append(f"values.npz holds {name!r}, which is none of the names verified.")


def check_vae(case: Case) -> None:
    """Compares latents of the video and of its first frame, and the video decoded from the folder's latents."""
    values, config = case.values, vae_config(case)
    params = jax.device_put(load_vae(config, open_weights(values.folder / "vae.safetensors")))
    encode, decode = (jax.jit(functools.partial(f, config=config)) for f in (vae.encode, vae.decode))
    if "vae_latents" in values.arrays or "vae_image_latents" in values.arrays:
        video = values.channels_last("vae_video")
        case.compare("vae_latents", encode(params, video))
        case.compare("vae_image_latents", encode(params, video[:, :1]))
    if "vae_decoded" in values.arrays:
        case.compare("vae_decoded", decode(params, values.channels_last("vae_latents")), "decode")


def vae_config(case: Case) -> vae.VAEConfig:
    """Reads sizes from config.json, and latent statistics from values.npz; without those, they are Wan2.1's."""
    sizes, arrays = case.values.sizes("vae"), case.values.arrays
    statistics = {
        f"latent_{part}": tuple(arrays[f"vae_latent_{part}"].tolist())
        for part in ("mean", "std")
        if f"vae_latent_{part}" in arrays
    }
    return vae.VAEConfig(
        width=sizes["dim"],
        latent_channels=sizes["z_dim"],
        width_multipliers=tuple(sizes["dim_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        temporal_downsample=tuple(sizes["temporal_downsample"]),
        compute_dtype=case.compute_dtype,
        **statistics,
    )


def check_umt5(case: Case) -> None:
    """Compares the embeddings of token ids, those of padding too, since the encoder computes them."""
    values, sizes = case.values, case.values.sizes("umt5")
    config = umt5.UMT5Config(
        vocab_size=sizes["vocab"],
        width=sizes["dim"],
        attention_width=sizes["dim_attn"],
        ffn_width=sizes["dim_ffn"],
        num_heads=sizes["num_heads"],
        num_layers=sizes["num_layers"],
        num_buckets=sizes["num_buckets"],
        compute_dtype=case.compute_dtype,
    )
    ids, mask = (jnp.asarray(values.need(f"t5_{part}"), jnp.int32) for part in ("ids", "mask"))
    params = jax.device_put(load_umt5(config, open_weights(values.folder / "umt5.safetensors")))
    case.compare("t5_embeddings", umt5.encode_tokens(params, ids, mask, config))


def check_dinov3(case: Case) -> None:
    """Compares all tokens of normalised pixels: CLS, registers, patches.

    Raises:
      ValueError: there is no dinov3.json, or it is not this model's.
    """
    values = case.values
    path = values.folder / "dinov3.json"
    if not path.is_file():
        raise ValueError(f"{values.folder} lacks dinov3.json, the config.json that transformers writes.")
    config = dinov3.DINOv3Config.from_json(read_json(path), case.compute_dtype)
    params = jax.device_put(load_dinov3(config, open_weights(values.folder / "dinov3.safetensors")))
    case.compare("dino_tokens", dinov3.encode_tokens(params, values.channels_last("dino_pixels"), config))


CHECKS = {"vae": check_vae, "umt5": check_umt5, "dinov3": check_dinov3}
"""What compares the values of an encoder, by the name of its weight file."""
