"""DINOv3 as a `FeatureEncoder`: the last hidden states of the patches, without CLS and registers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refalign_jax.config import ComputeDtype
from refalign_jax.convert.dinov3 import dinov3_layers, dinov3_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import Tensors, to_ours
from refalign_jax.encoders.network import in_batches, replicate
from refalign_jax.models import dinov3
from refalign_jax.types import Float, Params


class DINOv3:
    """DINOv3, from a folder as transformers publishes it.

    Args:
      path: the folder, or the file of weights in it.
      published: what its config.json says.
      compute_dtype: dtype of the matrix products.
      batch_size: images a call, rounded up to a multiple of the devices.

    Raises:
      ValueError: a file that is not whole, or not this model's.
    """

    def __init__(self, path: Path, published: Mapping[str, Any], compute_dtype: ComputeDtype, batch_size: int) -> None:
        self._config = dinov3.DINOv3Config.from_json(published, compute_dtype)
        self.patch_size, self.width = self._config.patch_size, self._config.width
        self._params = replicate(load_dinov3(self._config, open_weights(path)))
        self._batch_size, self._path = batch_size, path

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        return {
            "name": "dinov3",
            "path": str(self._path),
            "patch_size": self.patch_size,
            "width": self.width,
            "num_layers": self._config.num_layers,
            "compute_dtype": self._config.compute_dtype,
        }

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Computes features as `FeatureEncoder.encode` specifies."""
        return in_batches(lambda x: dinov3.encode(self._params, x, self._config), images, self._batch_size)


def load_dinov3(config: dinov3.DINOv3Config, weights: Tensors) -> Params:
    """Reads the parameters as numpy arrays.

    Raises:
      ValueError: tensors that are missing, extra or misshapen, listed with their shapes.
    """
    shapes = jax.eval_shape(lambda: dinov3.init(config, jax.random.key(0)))
    return to_ours(dinov3_table(config, dinov3_layers(weights.shapes)), shapes, weights)
