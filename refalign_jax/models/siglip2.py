"""SigLIP2's vision transformer: images to patch features on the DiT's grid.

It is published in two forms. The one for images of a fixed size has the model_type `siglip`; NaFlex, for any aspect,
has `siglip2`. Both have position embeddings on a square grid, which are resized to the image's grid: the first's by
bicubic interpolation, NaFlex's by bilinear interpolation with antialias. There is no CLS token, no register and no λ.
The pooling head and the text model are not used. An image is resized first where the patches are not 16 pixels, as
DINOv2's is. Pixels stay in [-1, 1], the range that SigLIP2 was trained on.

Source: Tschannen et al. 2025 (arXiv 2502.14786); names, defaults and the filters of the position embeddings are those
of transformers' `SiglipVisionModel` and `Siglip2VisionModel`.
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

from refalign_jax.models import vit
from refalign_jax.models.dinov2 import grid_of
from refalign_jax.types import Array, Float, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigLIP2Config(vit.ViTConfig):
    """Sizes and options; the defaults are ViT-B/16 for images of 256x256.

    Attributes:
      eps: added to the variance in every LayerNorm.
      layerscale: there is none.
      hidden_act: activation of the MLP.
      grid: rows, and columns, of the position embeddings.
      naflex: whether it is the form for any aspect.
    """

    eps: float = 1e-6
    layerscale: float | None = None
    hidden_act: str = "gelu_pytorch_tanh"
    grid: int = 16
    naflex: bool = False

    @property
    def resampling(self) -> vit.Resampling:
        """How the position embeddings are resized."""
        return "bilinear_antialias" if self.naflex else "bicubic"

    @classmethod
    def from_json(
        cls, published: Mapping[str, Any], compute_dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> SigLIP2Config:
        """Reads the published config.json of the whole model or of the vision model alone.

        Args:
          published: the parsed file, with transformers' names and its defaults for missing entries.
          compute_dtype: dtype of the matrix products, which the file does not give.

        Raises:
          ValueError: the file is another model's, or has a value that is not supported here.
        """
        vit.check_model_type(published, *MODEL_TYPES)
        naflex = published["model_type"].startswith("siglip2")
        vision = published if published["model_type"].endswith("_vision_model") else published.get("vision_config", {})
        if not isinstance(vision, Mapping):
            raise ValueError(f"config.json has vision_config {vision!r:.60}; it must be an object.")
        found = {"image_size": 224, "patch_size": 16, "num_patches": 256} | dict(vision)
        grid = math.isqrt(found["num_patches"]) if naflex else grid_of(found)
        if naflex and grid**2 != found["num_patches"]:
            raise ValueError(f"config.json has num_patches {found['num_patches']}; it must be a square.")
        return cls.read(found, grid=grid, naflex=naflex, compute_dtype=compute_dtype)


MODEL_TYPES = ("siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model")
"""`model_type` of the published forms: the whole model, and the vision model alone."""


def init(config: SigLIP2Config, key: Array) -> dict[str, Any]:
    """Initialises the parameters, a nested dict, float32; those of all blocks are stacked along a leading axis."""
    common_key, position_key = jax.random.split(key)
    position = nn.initializers.normal(config.width**-0.5)(position_key, (config.grid**2, config.width))
    return vit.init(config, common_key) | {"position_embedding": position}


@functools.partial(jax.jit, static_argnames="config")
def encode(params: Params, pixels: Float[Array, "B h w 3"], config: SigLIP2Config) -> Float[Array, "B h/16 w/16 E"]:
    """Computes the patch features of images, on the DiT's reference grid.

    Args:
      params: as `init` returns them, in any float dtype; each layer is cast when it runs.
      pixels: RGB in [-1, 1], rows and columns multiples of 16.
      config: sizes and compute dtype.

    Returns:
      The tokens after the last LayerNorm, float32.

    Raises:
      ValueError: height or width is not a positive multiple of 16.
    """
    size = (pixels.shape[1] // vit.CELL, pixels.shape[2] // vit.CELL)
    patches = vit.embed_patches(params, vit.fit_to_cells(pixels.astype(jnp.float32), config), config)
    square = params["position_embedding"].reshape(1, config.grid, config.grid, config.width)
    x = patches + vit.resize(square, size, config.resampling).reshape(1, -1, config.width)
    return vit.on_cells(vit.run_blocks(params, x, config), pixels)
