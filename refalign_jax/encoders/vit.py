"""Published vision transformers as `FeatureEncoder`s: the last hidden states of the patches alone, on the DiT's grid.

DINOv3     patches of 16 pixels; CLS and registers are dropped
DINOv2     patches of 14 pixels, so that images are resized; CLS and registers are dropped
SigLIP2    patches of 16 pixels, or of 14 as DINOv2
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refalign_jax.config import ComputeDtype
from refalign_jax.convert.dinov2 import dinov2_names, dinov2_table, ungated
from refalign_jax.convert.dinov3 import dinov3_layers, dinov3_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.siglip2 import siglip2_table, vision_part
from refalign_jax.convert.table import Tensors, to_ours
from refalign_jax.encoders.network import in_batches, replicate
from refalign_jax.models import dinov2, dinov3, siglip2
from refalign_jax.models.vit import CELL, ViTConfig
from refalign_jax.types import Array, Float, Params


def load_dinov3(config: dinov3.DINOv3Config, weights: Tensors) -> Params:
    """Reads the parameters as numpy arrays.

    Raises:
      ValueError: tensors that are missing, extra or misshapen, listed with their shapes.
    """
    shapes = jax.eval_shape(lambda: dinov3.init(config, jax.random.key(0)))
    return to_ours(dinov3_table(config, dinov3_layers(weights.shapes)), shapes, weights)


def load_dinov2(config: dinov2.DINOv2Config, weights: Tensors) -> Params:
    """Reads the parameters as numpy arrays; errors as in `load_dinov3`."""
    shapes = jax.eval_shape(lambda: dinov2.init(config, jax.random.key(0)))
    weights = ungated(weights)
    return to_ours(dinov2_table(config, dinov2_names(weights.shapes)), shapes, weights)


def load_siglip2(config: siglip2.SigLIP2Config, weights: Tensors) -> Params:
    """Reads the parameters of the vision model as numpy arrays; errors as in `load_dinov3`."""
    shapes = jax.eval_shape(lambda: siglip2.init(config, jax.random.key(0)))
    return to_ours(siglip2_table(config), shapes, vision_part(weights))


@dataclasses.dataclass(frozen=True)
class _Model:
    """A kind of vision transformer: its name in manifests, how its files are read, and what it computes."""

    name: str
    from_json: Callable[[Mapping[str, Any], ComputeDtype], Any]
    load: Callable[[Any, Tensors], Params]
    encode: Callable[[Params, Array, Any], Array]


_SIGLIP2 = _Model("siglip2", siglip2.SigLIP2Config.from_json, load_siglip2, siglip2.encode)
_DINOV2 = _Model("dinov2", dinov2.DINOv2Config.from_json, load_dinov2, dinov2.encode)
_MODELS = {
    "dinov3_vit": _Model("dinov3", dinov3.DINOv3Config.from_json, load_dinov3, dinov3.encode),
    "dinov2": _DINOV2,
    dinov2.WITH_REGISTERS: dataclasses.replace(_DINOV2, name=dinov2.WITH_REGISTERS),
    **dict.fromkeys(siglip2.MODEL_TYPES, _SIGLIP2),
}
MODEL_TYPES = tuple(_MODELS)
"""`model_type` of every config.json that is known here."""


class VisionTransformer:
    """A vision transformer, from a folder as transformers publishes it.

    Args:
      path: the folder, or the file of weights in it.
      published: what its config.json says; its model_type is one of `MODEL_TYPES`.
      compute_dtype: dtype of the matrix products.
      batch_size: images a call, rounded up to a multiple of the devices.

    Raises:
      ValueError: a file that is not whole, or not this model's.
    """

    patch_size = CELL

    def __init__(self, path: Path, published: Mapping[str, Any], compute_dtype: ComputeDtype, batch_size: int) -> None:
        self._model = _MODELS[published["model_type"]]
        self._config: ViTConfig = self._model.from_json(published, compute_dtype)
        self.width = self._config.width
        self._params = replicate(self._model.load(self._config, open_weights(path)))
        self._batch_size, self._path = batch_size, path

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        return {
            "name": self._model.name,
            "path": str(self._path),
            "patch_size": self._config.patch_size,
            "width": self.width,
            "num_layers": self._config.num_layers,
            "compute_dtype": self._config.compute_dtype,
        }

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Computes features as `FeatureEncoder.encode` specifies."""
        return in_batches(lambda x: self._model.encode(self._params, x, self._config), images, self._batch_size)
