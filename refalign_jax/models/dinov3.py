"""DINOv3 vision transformer: images to the patch features the references are aligned with.

An image is cut into (h/16)·(w/16) patches; a CLS token and four registers precede them. With x the residual stream,

    x += λ₁ ⊙ O · softmax(rope(q) rope(k)ᵀ / √K) v,   q, k, v = projections of LN(x),
    x += λ₂ ⊙ MLP(LN(x)),

MLP = W₂ gelu(W₁ ·), or W₂ (silu(Wg ·) ⊙ W₁ ·) in the gated sizes, and a last LayerNorm follows. RoPE rotates only the
patch tokens: with y, x ∈ (−1, 1) the coordinates of a patch's centre over the whole image and ω_m = θ^(−4m/K), m < K/4,
the angles are 2π(y·ω, x·ω), and channel m of a head's first half pairs with channel m of its second half.
This is evaluation mode, without the random shift, jitter and rescaling of coordinates that DINOv3 is trained with.

Source: Siméoni et al. 2025 (arXiv 2508.10104); names and defaults follow its published config.json.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.models.by_head import attend_by_head
from refalign_jax.models.layers import init_stack, precision_of
from refalign_jax.types import Array, Float, Params

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of each channel of ImageNet's images, RGB in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DINOv3Config:
    """Sizes and options; the defaults are ViT-B/16.

    Attributes:
      patch_size: side of a patch, pixels.
      width: E, width of the residual stream and of the features.
      ffn_width: hidden width of the MLP.
      num_layers: number of blocks.
      num_heads: N.
      num_register_tokens: registers between CLS and patches.
      rope_theta: θ, base of the RoPE frequencies.
      eps: added to the variance in every LayerNorm.
      layerscale: initial value of λ₁ and λ₂.
      query_bias: whether the query projection has a bias.
      key_bias: whether the key projection has a bias.
      value_bias: whether the value projection has a bias.
      proj_bias: whether the attention's output projection has a bias.
      mlp_bias: whether the projections of the MLP have biases.
      use_gated_mlp: whether the MLP is gated.
      hidden_act: activation of the MLP; gelu is the exact one, with erf.
      compute_dtype: dtype of the matrix products; norms, softmax, RoPE and the residual stream are float32.
    """

    patch_size: int = 16
    width: int = 768
    ffn_width: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    num_register_tokens: int = 4
    rope_theta: float = 100.0
    eps: float = 1e-5
    layerscale: float = 1.0
    query_bias: bool = True
    key_bias: bool = False
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    hidden_act: Literal["gelu", "silu"] = "gelu"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field in ("patch_size", "width", "ffn_width", "num_layers", "num_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"DINOv3Config.{field} is {getattr(self, field)}; it must be at least 1.")
        if self.num_register_tokens < 0:
            raise ValueError(f"DINOv3Config.num_register_tokens is {self.num_register_tokens}; it must be 0 or more.")
        if self.width % (4 * self.num_heads):
            raise ValueError(
                f"DINOv3Config.width is {self.width}; RoPE in two dimensions needs a multiple of 4·num_heads, "
                f"{4 * self.num_heads}."
            )
        if self.hidden_act not in ("gelu", "silu"):
            raise ValueError(f"DINOv3Config.hidden_act is {self.hidden_act!r}; it must be gelu or silu.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"DINOv3Config.compute_dtype is {self.compute_dtype!r}; it must be float32 or bfloat16.")

    @classmethod
    def from_json(cls, published: Mapping[str, Any], compute_dtype: Literal["float32", "bfloat16"] = "float32") -> Self:
        """Reads the published config.json, with transformers' names and its defaults for missing entries.

        Args:
          published: the parsed file.
          compute_dtype: dtype of the matrix products, which the file does not give.

        Raises:
          ValueError: the file is another model's, or has a value that is not supported here.
        """
        if published.get("model_type") != "dinov3_vit":
            raise ValueError(f"config.json has model_type {published.get('model_type')!r}; it must be 'dinov3_vit'.")
        if published.get("num_channels", 3) != 3:
            raise ValueError(f"config.json has num_channels {published['num_channels']}; it must be 3, for RGB.")
        defaults = {"width": 384, "ffn_width": 1536, "num_heads": 6, "num_register_tokens": 0}
        values = {
            field.name: published.get(
                PUBLISHED_FIELDS.get(field.name, field.name), defaults.get(field.name, field.default)
            )
            for field in dataclasses.fields(cls)
        }
        return cls(**values | {"compute_dtype": compute_dtype})


PUBLISHED_FIELDS = {
    "width": "hidden_size",
    "ffn_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "eps": "layer_norm_eps",
    "layerscale": "layerscale_value",
}
"""Fields whose name in the published config.json is another."""

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


class Block(nn.Module):
    """Attention with RoPE, then the MLP, each after a LayerNorm and scaled per channel."""

    config: DINOv3Config

    def _dense(self, width: int, use_bias: bool, name: str) -> nn.Dense:
        """A linear map in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return nn.Dense(width, use_bias=use_bias, dtype=dtype, precision=precision_of(dtype), name=name)

    def _layerscale(self, name: str) -> Float[Array, " E"]:
        return self.param(name, nn.initializers.constant(self.config.layerscale), (self.config.width,), jnp.float32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], cos: Float[Array, "T K/2"], sin: Float[Array, "T K/2"]
    ) -> Float[Array, "B T E"]:
        """Returns the residual stream after the block, float32.

        Args:
          x: residual stream, float32.
          cos: cosine of each token's RoPE angles.
          sin: their sine.
        """
        config = self.config
        heads = (*x.shape[:2], config.num_heads, config.width // config.num_heads)

        h = _norm(config, "attention_norm")(x)
        q = rotate(self._dense(config.width, config.query_bias, "query")(h).reshape(heads), cos, sin)
        k = rotate(self._dense(config.width, config.key_bias, "key")(h).reshape(heads), cos, sin)
        v = self._dense(config.width, config.value_bias, "value")(h).reshape(heads)
        h = attend_by_head(q, k, v, scale=1 / math.sqrt(heads[-1]))
        h = self._dense(config.width, config.proj_bias, "out")(h.reshape(x.shape))
        x = x + self._layerscale("attention_scale") * h

        h = _norm(config, "mlp_norm")(x)
        activation = functools.partial(jax.nn.gelu, approximate=False) if config.hidden_act == "gelu" else jax.nn.silu
        hidden = self._dense(config.ffn_width, config.mlp_bias, "mlp_in")(h)
        if config.use_gated_mlp:
            hidden = activation(self._dense(config.ffn_width, config.mlp_bias, "mlp_gate")(h)) * hidden
        else:
            hidden = activation(hidden)
        h = self._dense(config.width, config.mlp_bias, "mlp_out")(hidden)
        return x + self._layerscale("mlp_scale") * h


def init(config: DINOv3Config, key: Array) -> dict[str, Any]:
    """Initialises the parameters.

    Args:
      config: sizes.
      key: random key.

    Returns:
      A nested dict, float32; the parameters of all blocks are stacked along a leading layer axis.
    """
    E, size = config.width, config.patch_size
    kernel_key, cls_key, register_key, blocks_key, norm_key = jax.random.split(key, 5)
    token = nn.initializers.truncated_normal(0.02)
    x, angles = jnp.zeros((1, 1, E)), jnp.zeros((1, E // config.num_heads // 2))
    return {
        "patch_kernel": nn.initializers.lecun_normal()(kernel_key, (size, size, 3, E)),
        "patch_bias": jnp.zeros(E),
        "cls_token": token(cls_key, (1, 1, E)),
        "register_tokens": token(register_key, (1, config.num_register_tokens, E)),
        # Replaces masked patches in DINOv3's own training. It is unused here, and there so that weights convert whole.
        "mask_token": jnp.zeros((1, 1, E)),
        "blocks": init_stack(Block(config), config.num_layers, blocks_key, x, angles, angles),
        "norm": _norm(config).init(norm_key, x)["params"],
    }


def normalize(pixels: Float[Array, "*B h w 3"]) -> Float[Array, "*B h w 3"]:
    """Normalises RGB in [-1, 1], the range of videos here, by ImageNet's: ((p + 1)/2 − mean) / std, float32."""
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return ((pixels.astype(jnp.float32) + 1) / 2 - mean) / std


@functools.partial(jax.jit, static_argnames="config")
def encode_tokens(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B T E"]:
    """Encodes images to tokens.

    Args:
      params: as `init` returns them, in any float dtype; each layer is cast when it runs.
      pixels: RGB normalised by ImageNet's mean and deviation, as by `normalize`; where the images are split over
        devices by the batch, so is the work.
      config: sizes and compute dtype.

    Returns:
      All tokens after the last LayerNorm, float32: CLS, registers, patches row by row; T = 1 + registers + h/16·w/16.

    Raises:
      ValueError: height or width is not a positive multiple of the patch size.
    """
    size = config.patch_size
    batch, height, width, _ = pixels.shape
    if height % size or width % size or not height or not width:
        raise ValueError(f"The image is {height}x{width} pixels; DINOv3 needs multiples of {size}.")
    rows, columns = height // size, width // size
    first = jnp.concatenate([params["cls_token"], params["register_tokens"]], axis=1).astype(jnp.float32)
    patches = _embed_patches(params, pixels, config)
    x = jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape[1:])), patches], axis=1)
    angles = rope_angles(rows, columns, config)
    cos, sin = jnp.cos(angles), jnp.sin(angles)

    def run_block(x: Array, params: Params) -> tuple[Array, None]:
        return cast(Array, Block(config).apply({"params": params}, x, cos, sin)), None

    x, _ = jax.lax.scan(run_block, x, params["blocks"])
    return cast(Array, _norm(config).apply({"params": params["norm"]}, x))


@functools.partial(jax.jit, static_argnames="config")
def encode(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B h/16 w/16 E"]:
    """Computes the patch features of images, on the DiT's reference grid.

    Args:
      params: as in `encode_tokens`.
      pixels: RGB in [-1, 1], not normalised.
      config: sizes and compute dtype.

    Returns:
      The tokens after the last LayerNorm without CLS and registers, float32.

    Raises:
      ValueError: height or width is not a positive multiple of the patch size.
    """
    batch, height, width, _ = pixels.shape
    tokens = encode_tokens(params, normalize(pixels), config)
    grid = (batch, height // config.patch_size, width // config.patch_size, config.width)
    return tokens[:, 1 + config.num_register_tokens :].reshape(grid)


def _embed_patches(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B P E"]:
    """Embeds each patch, float32; a convolution whose stride is its kernel is a matrix product over patches."""
    size, dtype = config.patch_size, jnp.dtype(config.compute_dtype)
    batch, height, width, _ = pixels.shape
    patches = pixels.reshape(batch, height // size, size, width // size, size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = jnp.matmul(
        patches.reshape(batch, height // size * (width // size), -1).astype(dtype),
        params["patch_kernel"].reshape(-1, config.width).astype(dtype),
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )
    return x + params["patch_bias"]


def _norm(config: DINOv3Config, name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=config.eps, dtype=jnp.float32, use_fast_variance=False, name=name)
