"""DINOv3 vision transformer: images to the patch features the references are aligned with.

An image becomes (h/16)·(w/16) patches; a CLS token and four registers go before them. With x the residual stream,

    x += λ₁ ⊙ O · softmax(rope(q) rope(k)ᵀ / √K) v,   q, k, v = projections of LN(x),
    x += λ₂ ⊙ MLP(LN(x)),

MLP = W₂ gelu(W₁ ·), or W₂ (silu(Wg ·) ⊙ W₁ ·) in the gated sizes, and a last LayerNorm follows. RoPE turns the patch
tokens alone: with y, x ∈ (−1, 1) the coordinates of a patch's centre over the whole image and
ω_m = θ^(−4m/K), m < K/4, the angles are 2π(y·ω, x·ω), and the first half of a head's channels pairs with the second.
This is evaluation mode: training's random shift, jitter and rescaling of the coordinates are not here.

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
from refalign_jax.types import Array, Float, Params

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Per channel, of RGB in [0, 1]."""


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
      eps: of every LayerNorm.
      layerscale: initial value of λ₁ and λ₂; weights that are loaded replace it.
      query_bias: whether the query projection has a bias; likewise the next four.
      key_bias: see `query_bias`.
      value_bias: see `query_bias`.
      proj_bias: of the attention's output projection.
      mlp_bias: of all projections of the MLP.
      use_gated_mlp: whether the MLP is gated.
      hidden_act: the MLP's activation; gelu is the exact one, with erf.
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
        """Reads the published config.json (transformers' names, its defaults for what is not there).

        Args:
          published: the parsed file.
          compute_dtype: ours to choose; the file does not say.

        Raises:
          ValueError: the file is of another model, or has a value that this one does not know.
        """
        if published.get("model_type") != "dinov3_vit":
            raise ValueError(f"config.json has model_type {published.get('model_type')!r}; it must be 'dinov3_vit'.")
        if published.get("num_channels", 3) != 3:
            raise ValueError(f"config.json has num_channels {published['num_channels']}; it must be 3, for RGB.")
        defaults = {"width": 384, "ffn_width": 1536, "num_heads": 6, "num_register_tokens": 0}
        values = {
            field.name: published.get(_PUBLISHED.get(field.name, field.name), defaults.get(field.name, field.default))
            for field in dataclasses.fields(cls)
        }
        return cls(**values | {"compute_dtype": compute_dtype})


_PUBLISHED = {
    "width": "hidden_size",
    "ffn_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "eps": "layer_norm_eps",
    "layerscale": "layerscale_value",
}

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
    """RoPE angles in radians, float32 [tokens, K/2], of CLS, registers (0: not turned) and patches, row by row."""
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
    """Turns channel m of the first half of K with channel m of the second by the token's angle, in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class Block(nn.Module):
    """Attention with RoPE, then the MLP, each behind a LayerNorm and scaled per channel."""

    config: DINOv3Config

    def _dense(self, width: int, use_bias: bool, name: str) -> nn.Dense:
        """A linear map in the compute dtype; no TF32 where that is float32."""
        precision = jax.lax.Precision.HIGHEST if self.config.compute_dtype == "float32" else None
        return nn.Dense(width, use_bias=use_bias, dtype=self.config.compute_dtype, precision=precision, name=name)

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=self.config.eps, dtype=jnp.float32, use_fast_variance=False, name=name)

    def _layerscale(self, name: str) -> Float[Array, " E"]:
        return self.param(name, nn.initializers.constant(self.config.layerscale), (self.config.width,), jnp.float32)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], cos: Float[Array, "T K/2"], sin: Float[Array, "T K/2"]
    ) -> tuple[Float[Array, "B T E"], None]:
        """Returns (x after the block, None), as `nn.scan` asks of a carry.

        Args:
          x: residual stream, float32.
          cos: cosine of each token's RoPE angles.
          sin: their sine.
        """
        config = self.config
        heads = (*x.shape[:2], config.num_heads, config.width // config.num_heads)

        h = self._norm("attention_norm")(x)
        q = rotate(self._dense(config.width, config.query_bias, "query")(h).reshape(heads), cos, sin)
        k = rotate(self._dense(config.width, config.key_bias, "key")(h).reshape(heads), cos, sin)
        v = self._dense(config.width, config.value_bias, "value")(h).reshape(heads)
        h = attend_by_head(q, k, v, scale=1 / math.sqrt(heads[-1]))
        h = self._dense(config.width, config.proj_bias, "out")(h.reshape(x.shape))
        x = x + self._layerscale("attention_scale") * h

        h = self._norm("mlp_norm")(x)
        activation = functools.partial(jax.nn.gelu, approximate=False) if config.hidden_act == "gelu" else jax.nn.silu
        hidden = self._dense(config.ffn_width, config.mlp_bias, "mlp_in")(h)
        if config.use_gated_mlp:
            hidden = activation(self._dense(config.ffn_width, config.mlp_bias, "mlp_gate")(h)) * hidden
        else:
            hidden = activation(hidden)
        h = self._dense(config.width, config.mlp_bias, "mlp_out")(hidden)
        return x + self._layerscale("mlp_scale") * h, None


class DINOv3(nn.Module):
    """Patch embedding, CLS and registers, the blocks (stacked on a leading layer axis and scanned), a last norm."""

    config: DINOv3Config

    @nn.compact
    def __call__(self, pixels: Float[Array, "B h w 3"]) -> Float[Array, "B T E"]:
        """Encodes images.

        Args:
          pixels: RGB normalised by ImageNet's mean and deviation, as `normalize` does.

        Returns:
          All tokens after the last LayerNorm, float32: CLS, registers, patches row by row.

        Raises:
          ValueError: height or width is not a multiple of the patch size.
        """
        config, size = self.config, self.config.patch_size
        batch, height, width, _ = pixels.shape
        if height % size or width % size or not height or not width:
            raise ValueError(f"The image is {height}x{width} pixels; DINOv3 needs multiples of {size}.")
        rows, columns = height // size, width // size
        kernel = self.param("patch_kernel", nn.initializers.lecun_normal(), (size, size, 3, config.width), jnp.float32)
        bias = self.param("patch_bias", nn.initializers.zeros, (config.width,), jnp.float32)
        token = nn.initializers.truncated_normal(0.02)
        cls = self.param("cls_token", token, (1, 1, config.width), jnp.float32)
        registers = self.param("register_tokens", token, (1, config.num_register_tokens, config.width), jnp.float32)
        # Stands for hidden patches in DINOv3's own training; kept so that weights convert without loss.
        self.param("mask_token", nn.initializers.zeros, (1, 1, config.width), jnp.float32)

        # A convolution whose stride is its kernel is a matrix product over patches.
        patches = pixels.reshape(batch, rows, size, columns, size, 3).transpose(0, 1, 3, 2, 4, 5)
        dtype = jnp.dtype(config.compute_dtype)
        x = jnp.matmul(
            patches.reshape(batch, rows * columns, -1).astype(dtype),
            kernel.reshape(-1, config.width).astype(dtype),
            precision=jax.lax.Precision.HIGHEST if config.compute_dtype == "float32" else None,
            preferred_element_type=jnp.float32,
        )
        first = jnp.concatenate([cls, registers], axis=1).astype(jnp.float32)
        x = jnp.concatenate([jnp.broadcast_to(first, (batch, *first.shape[1:])), x + bias], axis=1)

        angles = rope_angles(rows, columns, config)
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=config.num_layers,
        )
        x, _ = blocks(config, name="blocks")(x, jnp.cos(angles), jnp.sin(angles))
        return nn.LayerNorm(epsilon=config.eps, dtype=jnp.float32, use_fast_variance=False, name="norm")(x)


def normalize(pixels: Float[Array, "*B h w 3"]) -> Float[Array, "*B h w 3"]:
    """Turns RGB in [-1, 1], the range of videos here, into ImageNet's: ((p + 1)/2 − mean) / std, float32."""
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return ((pixels.astype(jnp.float32) + 1) / 2 - mean) / std


@functools.partial(jax.jit, static_argnames="config")
def encode_tokens(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B T E"]:
    """All tokens of normalised images (see `normalize`): CLS, registers, patches; T = 1 + registers + h/16·w/16."""
    return cast(Array, DINOv3(config).apply({"params": params}, pixels))


@functools.partial(jax.jit, static_argnames="config")
def encode(params: Params, pixels: Float[Array, "B h w 3"], config: DINOv3Config) -> Float[Array, "B h/16 w/16 E"]:
    """Patch features of images, on the DiT's reference grid.

    Args:
      params: parameters of `DINOv3`; kept in the dtype given and cast a layer at a time.
      pixels: RGB in [-1, 1], not normalised. Sharded over the batch, the work is too.
      config: sizes.

    Returns:
      The last hidden state after the last LayerNorm without CLS and registers, float32.

    Raises:
      ValueError: height or width is not a multiple of the patch size.
    """
    batch, height, width, _ = pixels.shape
    tokens = encode_tokens(params, normalize(pixels), config)
    grid = (batch, height // config.patch_size, width // config.patch_size, config.width)
    return tokens[:, 1 + config.num_register_tokens :].reshape(grid)
