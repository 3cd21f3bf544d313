"""DINOv3 vision transformer: images to the patch features the references are aligned with.

An image is cut into (h/16)·(w/16) patches; a CLS token and four registers precede them. The blocks are those of vit.py,
with λ and with RoPE on queries and keys. RoPE rotates only the patch tokens: with y, x ∈ (−1, 1) the coordinates of a
patch's centre over the whole image and ω_m = θ^(−4m/K), m < K/4, the angles are 2π(y·ω, x·ω), and channel m of a head's
first half pairs with channel m of its second half.
This is evaluation mode, without the random shift, jitter and rescaling of coordinates that DINOv3 is trained with.

Source: Siméoni et al. 2025 (arXiv 2508.10104); names and defaults follow its published config.json.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.models import vit
from refalign_jax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv3Config(vit.ViTConfig):
    """Sizes and options; the defaults are ViT-B/16.

    Attributes:
      key_bias: whether the key projection has a bias.
      num_register_tokens: registers between CLS and patches.
      rope_theta: θ, base of the RoPE frequencies.
    """

    key_bias: bool = False
    num_register_tokens: int = 4
    rope_theta: float = 100.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_register_tokens < 0:
            raise ValueError(f"DINOv3Config.num_register_tokens is {self.num_register_tokens}; it must be 0 or more.")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"DINOv3Config.width is {self.width}; RoPE in two dimensions needs a multiple of 4·num_heads, "
                f"{4 * self.num_heads}."
            )

    @classmethod
    def from_json(
        cls, published: Mapping[str, Any], compute_dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> DINOv3Config:
        """Reads the published config.json, with transformers' names and its defaults for missing entries.

        Args:
          published: the parsed file.
          compute_dtype: dtype of the matrix products, which the file does not give.

        Raises:
          ValueError: the file is another model's, or has a value that is not supported here.
        """
        vit.check_model_type(published, "dinov3_vit")
        defaults = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6, "num_register_tokens": 0}
        return cls.read(defaults | dict(published), compute_dtype=compute_dtype)


_GATED: Any = {"use_gated_mlp": True, "hidden_act": "silu"}
VIT_S16 = DINOv3Config(width=384, ffn_width=1536, num_heads=6)
VIT_S16_PLUS = DINOv3Config(width=384, ffn_width=1536, num_heads=6, **_GATED)
VIT_B16 = DINOv3Config()
VIT_L16 = DINOv3Config(width=1024, ffn_width=4096, num_layers=24, num_heads=16)
VIT_H16_PLUS = DINOv3Config(width=1280, ffn_width=5120, num_layers=32, num_heads=20, **_GATED)
VIT_7B16 = DINOv3Config(
    width=4096, ffn_width=8192, num_layers=40, num_heads=32, query_bias=False, value_bias=False, **_GATED
)


def rope_angles(rows: int, columns: int, config: DINOv3Config) -> np.ndarray:
    """RoPE angles in radians, float32 [tokens, K/2]: 0 for CLS and registers, then those of the patches, row by row."""
    head_width = config.width // config.num_heads
    frequencies = 1 / np.float32(config.rope_theta) ** np.arange(0, 1, 4 / head_width, dtype=np.float32)
    y, x = np.meshgrid(
        2 * (np.arange(rows, dtype=np.float32) + np.float32(0.5)) / np.float32(rows) - 1,
        2 * (np.arange(columns, dtype=np.float32) + np.float32(0.5)) / np.float32(columns) - 1,
        indexing="ij",
    )
    centres = np.stack([y.reshape(-1), x.reshape(-1)], axis=-1)
    angles = np.float32(2 * math.pi) * centres[:, :, None] * frequencies
    angles = angles.reshape(rows * columns, head_width // 2).astype(np.float32)
    return np.concatenate([np.zeros((1 + config.num_register_tokens, head_width // 2), np.float32), angles])


def rotate(
    x: Float[Array, "B T N K"], cos: Float[Array, "T K/2"], sin: Float[Array, "T K/2"]
) -> Float[Array, "B T N K"]:
    """Rotates channel m of the first half of K with channel m of the second by the token's angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def init(config: DINOv3Config, key: Array) -> dict[str, Any]:
    """Initialises the parameters.

    Args:
      config: sizes.
      key: random key.

    Returns:
      A nested dict, float32; the parameters of all blocks are stacked along a leading layer axis.
    """
    E = config.width
    common_key, cls_key, register_key = jax.random.split(key, 3)
    token = nn.initializers.truncated_normal(0.02)
    return vit.init(config, common_key) | {
        "cls_token": token(cls_key, (1, 1, E)),
        "register_tokens": token(register_key, (1, config.num_register_tokens, E)),
        # Replaces masked patches in DINOv3's own training. It is unused here, and there so that weights convert whole.
        "mask_token": jnp.zeros((1, 1, E)),
    }


@functools.partial(jax.jit, static_argnames="config")
def encode_tokens(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B T E"]:
    """Encodes images to tokens.

    Args:
      params: as `init` returns them, in any float dtype; each layer is cast when it runs.
      pixels: RGB normalised by ImageNet's mean and deviation, as by `vit.normalize`; where the images are split over
        devices by the batch, so is the work.
      config: sizes and compute dtype.

    Returns:
      All tokens after the last LayerNorm, float32: CLS, registers, patches row by row; T = 1 + registers + h/16·w/16.

    Raises:
      ValueError: height or width is not a positive multiple of the patch size.
    """
    patches = vit.embed_patches(params, pixels, config)
    batch, height, width, _ = pixels.shape
    first = jnp.concatenate([params["cls_token"], params["register_tokens"]], axis=1).astype(jnp.float32)
    x = jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape[1:])), patches], axis=1)
    angles = rope_angles(height // config.patch_size, width // config.patch_size, config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return vit.run_blocks(params, x, config, lambda x: rotate(x, cos, sin))


@functools.partial(jax.jit, static_argnames="config")
def encode(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B h/16 w/16 E"]:
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
