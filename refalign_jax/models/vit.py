"""Layers that the vision transformers share: an image's patches, and blocks of attention and MLP.

With x the residual stream, a block computes

    x += λ₁ ⊙ O · softmax(q kᵀ / √K) v,   q, k, v = projections of LN(x),
    x += λ₂ ⊙ MLP(LN(x)),

MLP = W₂ act(W₁ ·) or, gated, W₂ (act(Wg ·) ⊙ W₁ ·); models without λ have 1 in its place. Positions are the models'
own: DINOv3 rotates q and k (dinov3.py), DINOv2 and SigLIP2 add embeddings to the patches, which `resize` fits to the
image.

Source: Dosovitskiy et al. 2021 (arXiv 2010.11929); the options are those of transformers' models.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax.config.checks import check_values
from refalign_jax.models.by_head import attend_by_head
from refalign_jax.models.layers import init_stack, precision_of
from refalign_jax.types import Array, Float, Params

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Mean and standard deviation of each channel of ImageNet's images, RGB in [0, 1]."""

Resampling = Literal["bicubic", "bicubic_antialias", "bilinear_antialias"]
"""How position embeddings are resized; the names are those of torch's `interpolate`, `align_corners` off."""

_ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Sizes and options that all vision transformers have; the defaults are ViT-B/16.

    Attributes:
      patch_size: side of a patch, pixels.
      width: E, width of the residual stream and of the features.
      ffn_width: hidden width of the MLP.
      num_layers: number of blocks.
      num_heads: N.
      eps: added to the variance in every LayerNorm.
      layerscale: initial value of λ₁ and λ₂; None for a model without them.
      query_bias: whether the query projection has a bias.
      key_bias: whether the key projection has a bias.
      value_bias: whether the value projection has a bias.
      proj_bias: whether the attention's output projection has a bias.
      mlp_bias: whether the projections of the MLP have biases.
      use_gated_mlp: whether the MLP is gated.
      hidden_act: activation of the MLP: gelu, the exact one with erf; gelu_pytorch_tanh and quick_gelu, which are
        approximations of it; or silu.
      compute_dtype: dtype of the matrix products; norms, softmax, RoPE and the residual stream are float32.
    """

    patch_size: int = 16
    width: int = 768
    ffn_width: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    eps: float = 1e-5
    layerscale: float | None = 1.0
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    hidden_act: str = "gelu"
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_values(self)
        kind = type(self).__name__
        for field in ("patch_size", "width", "ffn_width", "num_layers", "num_heads"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{kind}.{field} is {value}; it must be a whole number of at least 1.")
        if self.width % self.num_heads:
            raise ValueError(f"{kind}.width is {self.width}; it must be a multiple of num_heads, {self.num_heads}.")
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"{kind}.hidden_act is {self.hidden_act!r}; it must be one of {', '.join(_ACTIVATIONS)}.")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"{kind}.compute_dtype is {self.compute_dtype!r}; it must be float32 or bfloat16.")

    @classmethod
    def read(cls, published: Mapping[str, Any], **values: Any) -> Any:
        """Builds the configuration from a published config.json.

        Args:
          published: the parsed file, with transformers' names.
          **values: fields that the file does not give under a name, or not as they are here.

        Raises:
          ValueError: a value that is not supported here.
        """
        if published.get("num_channels", 3) != 3:
            raise ValueError(f"config.json has num_channels {published['num_channels']}; it must be 3, for RGB.")
        found = {
            field.name: published[name]
            for field in dataclasses.fields(cls)
            if (name := PUBLISHED_FIELDS.get(field.name, field.name)) in published
        }
        return cls(**found | values)


PUBLISHED_FIELDS = {
    "width": "hidden_size",
    "ffn_width": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "eps": "layer_norm_eps",
    "layerscale": "layerscale_value",
}
"""Fields whose name in the published config.json is another."""


def check_model_type(published: Mapping[str, Any], *known: str) -> None:
    """Raises ValueError unless a published config.json is of one of the known kinds of model."""
    if published.get("model_type") not in known:
        expected = " or ".join(map(repr, known))
        raise ValueError(f"config.json has model_type {published.get('model_type')!r}; it must be {expected}.")


def _same(x: Float[Array, "B T N K"]) -> Float[Array, "B T N K"]:
    """Returns queries or keys as they are, for models whose positions are in the patches."""
    return x


class Block(nn.Module):
    """Attention, then the MLP, each after a LayerNorm and, where the model has λ, scaled per channel."""

    config: ViTConfig

    def _dense(self, width: int, use_bias: bool, name: str) -> nn.Dense:
        """A linear map in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype)
        return nn.Dense(width, use_bias=use_bias, dtype=dtype, precision=precision_of(dtype), name=name)

    def _scaled(self, h: Float[Array, "B T E"], name: str) -> Float[Array, "B T E"]:
        if self.config.layerscale is None:
            return h
        initial = nn.initializers.constant(self.config.layerscale)
        return self.param(name, initial, (self.config.width,), jnp.float32) * h

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], rotate: Callable[[Float[Array, "B T N K"]], Float[Array, "B T N K"]] = _same
    ) -> Float[Array, "B T E"]:
        """Returns the residual stream after the block, float32.

        Args:
          x: residual stream, float32.
          rotate: what becomes of queries and keys, such as RoPE.
        """
        config = self.config
        heads = (*x.shape[:2], config.num_heads, config.width // config.num_heads)

        h = norm(config, "attention_norm")(x)
        q = rotate(self._dense(config.width, config.query_bias, "query")(h).reshape(heads))
        k = rotate(self._dense(config.width, config.key_bias, "key")(h).reshape(heads))
        v = self._dense(config.width, config.value_bias, "value")(h).reshape(heads)
        h = attend_by_head(q, k, v, scale=1 / math.sqrt(heads[-1]))
        h = self._dense(config.width, config.proj_bias, "out")(h.reshape(x.shape))
        x = x + self._scaled(h, "attention_scale")

        h = norm(config, "mlp_norm")(x)
        activation = _ACTIVATIONS[config.hidden_act]
        hidden = self._dense(config.ffn_width, config.mlp_bias, "mlp_in")(h)
        if config.use_gated_mlp:
            hidden = activation(self._dense(config.ffn_width, config.mlp_bias, "mlp_gate")(h)) * hidden
        else:
            hidden = activation(hidden)
        h = self._dense(config.width, config.mlp_bias, "mlp_out")(hidden)
        return x + self._scaled(h, "mlp_scale")


def init(config: ViTConfig, key: Array) -> dict[str, Any]:
    """Initialises patch embedding, blocks and last norm.

    Returns:
      A nested dict, float32; the parameters of all blocks are stacked along a leading layer axis.
    """
    E, size = config.width, config.patch_size
    kernel_key, blocks_key, norm_key = jax.random.split(key, 3)
    x = jnp.zeros((1, 1, E))
    return {
        "patch_kernel": nn.initializers.lecun_normal()(kernel_key, (size, size, 3, E)),
        "patch_bias": jnp.zeros(E),
        "blocks": init_stack(Block(config), config.num_layers, blocks_key, x),
        "norm": norm(config).init(norm_key, x)["params"],
    }


def run_blocks(
    params: Params,
    x: Float[Array, "B T E"],
    config: ViTConfig,
    rotate: Callable[[Float[Array, "B T N K"]], Float[Array, "B T N K"]] = _same,
) -> Float[Array, "B T E"]:
    """Runs all blocks and the last LayerNorm, float32.

    Args:
      params: with `blocks` and `norm`, as `init` returns them; each layer is cast when it runs.
      x: tokens.
      config: sizes and compute dtype.
      rotate: as in `Block`.
    """

    def run_block(x: Array, params: Params) -> tuple[Array, None]:
        return cast(Array, Block(config).apply({"params": params}, x, rotate)), None

    x, _ = jax.lax.scan(run_block, x, params["blocks"])
    return cast(Array, norm(config).apply({"params": params["norm"]}, x))


def embed_patches(params: Params, pixels: Float[Array, "B h w 3"], config: ViTConfig) -> Float[Array, "B P E"]:
    """Embeds each patch, row by row, float32; a convolution whose stride is its kernel is a matrix product.

    Raises:
      ValueError: height or width is not a positive multiple of the patch size.
    """
    size, dtype = config.patch_size, jnp.dtype(config.compute_dtype)
    batch, height, width, _ = pixels.shape
    check_grid(height, width, size, type(config).__name__.removesuffix("Config"))
    patches = pixels.reshape(batch, height // size, size, width // size, size, 3).transpose(0, 1, 3, 2, 4, 5)
    x = jnp.matmul(
        patches.reshape(batch, height // size * (width // size), -1).astype(dtype),
        params["patch_kernel"].reshape(-1, config.width).astype(dtype),
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )
    return x + params["patch_bias"]


def check_grid(height: int, width: int, size: int, name: str) -> None:
    """Raises ValueError unless an image of a model by that name is a whole number of cells of `size` pixels."""
    if height % size or width % size or not height or not width:
        raise ValueError(f"The image is {height}x{width} pixels; {name} needs multiples of {size}.")


def norm(config: ViTConfig, name: str | None = None) -> nn.LayerNorm:
    """Returns a LayerNorm in float32."""
    return nn.LayerNorm(epsilon=config.eps, dtype=jnp.float32, use_fast_variance=False, name=name)


def normalize(pixels: Float[Array, "*B h w 3"]) -> Float[Array, "*B h w 3"]:
    """Normalises RGB in [-1, 1], the range of videos here, by ImageNet's: ((p + 1)/2 − mean) / std, float32."""
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return ((pixels.astype(jnp.float32) + 1) / 2 - mean) / std


CELL = 16
"""Side in pixels of a token of the DiT: the VAE's stride 8 times the DiT's patch 2."""


def fit_to_cells(pixels: Float[Array, "B h w 3"], config: ViTConfig) -> Float[Array, "B h2 w2 3"]:
    """Resizes images so that a patch covers one token of the DiT: h·patch/16 x w·patch/16 pixels.

    The filter is bicubic (Keys, a = −0.5) and widened where the image shrinks, as Pillow's and torch's with antialias.

    Raises:
      ValueError: height or width is not a positive multiple of 16.
    """
    _, height, width, _ = pixels.shape
    check_grid(height, width, CELL, type(config).__name__.removesuffix("Config"))
    if config.patch_size == CELL:
        return pixels
    size = (height // CELL * config.patch_size, width // CELL * config.patch_size)
    return resize(pixels, size, "bicubic_antialias")


def on_cells(tokens: Float[Array, "B P E"], pixels: Float[Array, "B h w 3"]) -> Float[Array, "B h/16 w/16 E"]:
    """Puts the tokens of patches, row by row, on the DiT's grid of the images that they are of."""
    batch, height, width, _ = pixels.shape
    return tokens.reshape(batch, height // CELL, width // CELL, tokens.shape[-1])


def resize(x: Float[Array, "B r c E"], size: tuple[int, int], method: Resampling) -> Float[Array, "B r2 c2 E"]:
    """Resizes as torch's `interpolate` does, in float32.

    Args:
      x: images, or embeddings on a grid.
      size: rows and columns of the result.
      method: the filter. `bicubic` has a = −0.75 and repeats the border; the two others are JAX's own.
    """
    x = x.astype(jnp.float32)
    batch, rows, columns, channels = x.shape
    if method != "bicubic":
        filter_of = {"bicubic_antialias": "cubic", "bilinear_antialias": "linear"}
        shape, precision = (batch, *size, channels), jax.lax.Precision.HIGHEST
        return jax.image.resize(x, shape, filter_of[method], antialias=True, precision=precision)
    down, across = _bicubic(rows, size[0]), _bicubic(columns, size[1])
    return jnp.einsum("ir,jc,brce->bije", down, across, x, precision=jax.lax.Precision.HIGHEST)


def _bicubic(before: int, after: int) -> np.ndarray:
    """Weights [after, before], float32, of the cubic convolution with a = −0.75; the border is repeated."""
    centre = (np.arange(after) + 0.5) * (before / after) - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((after, before))
    a = -0.75
    for tap in range(4):
        d = np.abs(centre - (first + tap))
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        np.add.at(weights, (np.arange(after), np.clip(first + tap, 0, before - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)
