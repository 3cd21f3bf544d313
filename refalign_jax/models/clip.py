"""CLIP's vision transformer: images to one embedding each, which text embeddings and aesthetic heads are compared with.

A CLS token stands before the patches, position embeddings are added, and a LayerNorm comes before the blocks. The image
embedding is a projection of the CLS token after the last LayerNorm. Images have the fixed size that the position
embeddings are for.

Source: Radford et al. 2021 (arXiv 2103.00020); names and defaults are those of transformers'
`CLIPVisionModelWithProjection`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from refalign_jax.models import vit
from refalign_jax.types import Array, Float, Params

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of each channel of CLIP's training images, RGB in [0, 1]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CLIPConfig(vit.ViTConfig):
    """Sizes and options; the defaults are ViT-L/14.

    Attributes:
      patch_size: side of a patch, pixels.
      width: width of the residual stream.
      ffn_width: hidden width of the MLP.
      num_layers: number of blocks.
      num_heads: N.
      layerscale: there is none.
      hidden_act: activation of the MLP.
      grid: patches per row and per column of an image.
      embedding_width: width of the image embedding.
    """

    patch_size: int = 14
    width: int = 1024
    ffn_width: int = 4096
    num_layers: int = 24
    num_heads: int = 16
    layerscale: float | None = None
    hidden_act: str = "quick_gelu"
    grid: int = 16
    embedding_width: int = 768

    @property
    def image_size(self) -> int:
        """Rows, and columns, of an image."""
        return self.grid * self.patch_size

    @classmethod
    def from_json(
        cls, published: Mapping[str, Any], compute_dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> CLIPConfig:
        """Reads the published config.json of the whole model or of the vision model alone.

        Args:
          published: the parsed file, with transformers' names and its defaults for missing entries.
          compute_dtype: dtype of the matrix products, which the file does not give.

        Raises:
          ValueError: the file is another model's, or has a value that is not supported here.
        """
        vit.check_model_type(published, "clip", "clip_vision_model")
        vision = published.get("vision_config", {}) if published["model_type"] == "clip" else published
        if not isinstance(vision, Mapping):
            raise ValueError(f"config.json has vision_config {vision!r:.60}; it must be an object.")
        found = _PUBLISHED_DEFAULTS | dict(vision)
        if found["image_size"] % found["patch_size"]:
            raise ValueError(
                f"config.json has image_size {found['image_size']}; it must be a multiple of {found['patch_size']}."
            )
        width = published.get("projection_dim", found["projection_dim"])
        grid = found["image_size"] // found["patch_size"]
        return cls.read(found, grid=grid, embedding_width=width, compute_dtype=compute_dtype)


_PUBLISHED_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
}
"""Transformers' defaults for entries that config.json leaves out."""


def init(config: CLIPConfig, key: Array) -> dict[str, Any]:
    """Initialises the parameters, a nested dict, float32; those of all blocks are stacked along a leading axis."""
    common_key, cls_key, position_key, projection_key, norm_key = jax.random.split(key, 5)
    E, normal = config.width, nn.initializers.normal(config.width**-0.5)
    common = vit.init(config, common_key)
    del common["patch_bias"]  # the patch embedding has none
    return common | {
        "cls": normal(cls_key, (E,)),
        "position_embedding": normal(position_key, (1 + config.grid**2, E)),
        "first_norm": vit.norm(config).init(norm_key, jnp.zeros((1, 1, E)))["params"],
        "projection": normal(projection_key, (E, config.embedding_width)),
    }


def normalize(pixels: Float[Array, "*B h w 3"]) -> Float[Array, "*B h w 3"]:
    """Normalises RGB in [0, 1]: (p − mean) / std, float32."""
    return (pixels.astype(jnp.float32) - jnp.asarray(MEAN)) / jnp.asarray(STD)


@functools.partial(jax.jit, static_argnames="config")
def embed(params: Params, pixels: Float[Array, "B h w 3"], config: CLIPConfig) -> Float[Array, "B E"]:
    """Computes image embeddings.

    Args:
      params: as `init` returns them, in any float dtype; each layer is cast when it runs.
      pixels: RGB, normalised as by `normalize`, `config.image_size` rows and columns.
      config: sizes and compute dtype.

    Returns:
      The embeddings, not normalised, float32.

    Raises:
      ValueError: the images have another size.
    """
    size = config.image_size
    if pixels.shape[1:3] != (size, size):
        raise ValueError(f"The image is {pixels.shape[1]}x{pixels.shape[2]} pixels; CLIP needs {size}x{size}.")
    patches = vit.embed_patches({**params, "patch_bias": jnp.zeros(config.width)}, pixels, config)
    cls = jnp.broadcast_to(params["cls"].astype(jnp.float32), (len(pixels), 1, config.width))
    x = jnp.concatenate([cls, patches], axis=1) + params["position_embedding"].astype(jnp.float32)
    x = cast(Array, vit.norm(config).apply({"params": params["first_norm"]}, x))
    x = vit.run_blocks(params, x, config)
    return jnp.matmul(x[:, 0], params["projection"].astype(jnp.float32), precision="highest")
