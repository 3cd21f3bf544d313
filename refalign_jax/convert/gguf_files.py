"""GGUF files of a Wan transformer: quantised blocks become float32, by the package gguf, which is optional.

Files of Wan models keep the published names. GGML has at most four axes, so that a tensor of five, the patch embedding,
is stored flat and its shape is kept in the metadata, under `comfy.gguf.orig_shape.NAME`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.atomic import first_line
from refalign_jax.convert.table import Tensors

_SHAPE = "comfy.gguf.orig_shape."
_ARCHITECTURE = "general.architecture"


@dataclasses.dataclass(frozen=True)
class _Gguf:
    """Tensors of a GGUF file. Implements `table.Tensors`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    metadata: Mapping[str, str]
    stored: Mapping[str, Any]

    def read(self, name: str) -> np.ndarray:
        from gguf import quants

        tensor = self.stored[name]
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            return np.asarray(values, self.dtypes[name]).reshape(self.shapes[name])
        except Exception as error:  # the package raises whatever a damaged file or an unknown type leads to
            raise ValueError(f"{self.source}: {name} can't be read: {first_line(error)}.") from error


def open_gguf(path: Path) -> Tensors:
    """Opens a GGUF file; its tensors stay in the file until they are read.

    Raises:
      ValueError: the package gguf is not installed, the file is not whole, or it is not a Wan model's.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFReader
    except ImportError as error:
        raise ValueError(
            f"{path} is a GGUF file; reading it needs the package gguf: pip install -e '.[gguf]', or give the "
            "same model as safetensors."
        ) from error
    try:
        reader: Any = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        stored = {tensor.name: tensor for tensor in reader.tensors}
        shapes = {
            name: tuple(int(n) for n in fields.get(_SHAPE + name, reversed(tensor.shape.tolist())))
            for name, tensor in stored.items()
        }
        whole = all(math.prod(shapes[name]) == tensor.n_elements for name, tensor in stored.items())
    except Exception as error:  # the package raises whatever a damaged file leads to
        raise ValueError(f"{path} can't be read as GGUF: {first_line(error)}.") from error
    if not whole:
        raise ValueError(f"{path} can't be read as GGUF: a tensor's shape does not agree with its number of values.")
    if fields.get(_ARCHITECTURE) != "wan":
        raise ValueError(f"{path} is a GGUF file of {fields.get(_ARCHITECTURE)!r:.60}; a Wan model says 'wan' there.")
    half = GGMLQuantizationType.F16
    kinds = {name: np.dtype(np.float16 if t.tensor_type == half else np.float32) for name, t in stored.items()}
    return _Gguf(str(path), shapes, kinds, {_ARCHITECTURE: "wan"}, stored)
