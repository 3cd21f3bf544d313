"""DINOv2 vision transformer, with registers or without: images to patch features on the DiT's grid.

Its patches are 14 pixels, so an image is resized to h·14/16 x w·14/16 pixels first: token for token, its grid is then
the DiT's. A CLS token and the registers precede the patches. Position embeddings were learned on a square grid, 37x37
in the published models, for CLS and patches; those of the patches are resized to the image's grid. The blocks are those
of vit.py, with λ.

Source: Oquab et al. 2023 (arXiv 2304.07193), Darcet et al. 2024 (arXiv 2309.16588); names, defaults and the filter of
the position embeddings are those of transformers' `Dinov2Model` and `Dinov2WithRegistersModel`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from refalign_jax.models import vit
from refalign_jax.types import Array, Float, Params

WITH_REGISTERS = "dinov2_with_registers"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv2Config(vit.ViTConfig):
    """Sizes and options; the defaults are ViT-B/14 with registers.

    Attributes:
      patch_size: side of a patch, pixels.
      eps: added to the variance in every LayerNorm.
      num_register_tokens: registers between CLS and patches.
      grid: rows, and columns, of the position embeddings.
      resampling: how the position embeddings are resized.
      mask_token: whether the weights have a token for masked patches, which is unused here.
    """

    patch_size: int = 14
    eps: float = 1e-6
    num_register_tokens: int = 4
    grid: int = 37
    resampling: vit.Resampling = "bicubic_antialias"
    mask_token: bool = True

    @classmethod
    def from_json(
        cls, published: Mapping[str, Any], compute_dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> DINOv2Config:
        """Reads the published config.json, with transformers' names and its defaults for missing entries.

        Args:
          published: the parsed file.
          compute_dtype: dtype of the matrix products, which the file does not give.

        Raises:
          ValueError: the file is another model's, or has a value that is not supported here.
        """
        vit.check_model_type(published, "dinov2", WITH_REGISTERS)
        registers = published["model_type"] == WITH_REGISTERS
        found = {"hidden_size": 768, "mlp_ratio": 4, "image_size": 224, "patch_size": 16 if registers else 14}
        found |= {"qkv_bias": True, "use_swiglu_ffn": False} | dict(published)
        hidden = int(found["hidden_size"] * found["mlp_ratio"])
        values: dict[str, Any] = dict.fromkeys(("query_bias", "key_bias", "value_bias"), found["qkv_bias"])
        if found["use_swiglu_ffn"]:
            values |= {"use_gated_mlp": True, "hidden_act": "silu"}
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        return cls.read(
            found,
            **values,
            ffn_width=hidden,
            grid=grid_of(found),
            num_register_tokens=found.get("num_register_tokens", 4) if registers else 0,
            resampling="bicubic_antialias" if registers else "bicubic",
            mask_token=registers or found.get("use_mask_token", True),
            compute_dtype=compute_dtype,
        )


def grid_of(published: Mapping[str, Any]) -> int:
    """Rows, and columns, of the patches of the square images that a published model was trained on.

    Raises:
      ValueError: they were not square, or smaller than a patch.
    """
    size, patch = published["image_size"], published["patch_size"]
    for name, value in (("image_size", size), ("patch_size", patch)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"config.json has {name} {value!r}; it must be a whole number, the side of a square.")
    if size < patch:
        raise ValueError(f"config.json has image_size {size}; it must be at least patch_size, {patch}.")
    return int(size // patch)


def init(config: DINOv2Config, key: Array) -> dict[str, Any]:
    """Initialises the parameters, a nested dict, float32; those of all blocks are stacked along a leading axis."""
    E = config.width
    common_key, cls_key, position_key, register_key = jax.random.split(key, 4)
    token = nn.initializers.truncated_normal(0.02)
    params = vit.init(config, common_key) | {
        "cls_token": token(cls_key, (1, 1, E)),
        "position_embedding": token(position_key, (1, 1 + config.grid**2, E)),
    }
    if config.num_register_tokens:
        params["register_tokens"] = token(register_key, (1, config.num_register_tokens, E))
    if config.mask_token:
        params["mask_token"] = jnp.zeros((1, E))
    return params


@functools.partial(jax.jit, static_argnames="config")
def encode_tokens(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv2Config) -> Float[Array, "B T E"]:
    """Encodes images to tokens.

    Args:
      params: as `init` returns them, in any float dtype; each layer is cast when it runs.
      pixels: RGB normalised by ImageNet's mean and deviation, as by `vit.normalize`.
      config: sizes and compute dtype.

    Returns:
      All tokens after the last LayerNorm, float32: CLS, registers, patches row by row.

    Raises:
      ValueError: height or width is not a positive multiple of the patch size.
    """
    patches = vit.embed_patches(params, pixels, config)
    batch, height, width, _ = pixels.shape
    positions = params["position_embedding"].astype(jnp.float32)
    square = positions[:, 1:].reshape(1, config.grid, config.grid, config.width)
    size = (height // config.patch_size, width // config.patch_size)
    patches = patches + vit.resize(square, size, config.resampling).reshape(1, -1, config.width)
    first = params["cls_token"].astype(jnp.float32) + positions[:, :1]
    if config.num_register_tokens:
        first = jnp.concatenate([first, params["register_tokens"].astype(jnp.float32)], axis=1)
    x = jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape[1:])), patches], axis=1)
    return vit.run_blocks(params, x, config)


@functools.partial(jax.jit, static_argnames="config")
def encode(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv2Config) -> Float[Array, "B h/16 w/16 E"]:
    """Computes the patch features of images, on the DiT's reference grid.

    Args:
      params: as in `encode_tokens`.
      pixels: RGB in [-1, 1], not normalised, rows and columns multiples of 16.
      config: sizes and compute dtype.

    Returns:
      The tokens after the last LayerNorm without CLS and registers, float32.

    Raises:
      ValueError: height or width is not a positive multiple of 16.
    """
    fitted = vit.fit_to_cells(pixels.astype(jnp.float32), config)
    tokens = encode_tokens(params, vit.normalize(fitted), config)
    return vit.on_cells(tokens[:, 1 + config.num_register_tokens :], pixels)
