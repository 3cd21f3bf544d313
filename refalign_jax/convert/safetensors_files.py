"""One safetensors file, read a tensor at a time. The library checks its structure."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
"""The safetensors dtype names that are read and written."""

READ_ONLY: dict[str, np.dtype] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "U32": np.dtype(np.uint32),
    "U64": np.dtype(np.uint64),
    "BOOL": np.dtype(np.bool_),
}
"""Further dtype names that are read: float8, and those that are refused where a weight has them."""

_KNOWN = DTYPES | READ_ONLY


@dataclasses.dataclass(frozen=True)
class SafetensorsWeights:
    """Tensors of one safetensors file. Implements `table.Tensors`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    metadata: Mapping[str, str]
    offsets: Mapping[str, tuple[int, int]]
    """First byte and the byte after the last, in the file."""

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as stored, mapped into memory read-only: what is not looked at is not read."""
        begin, end = self.offsets[name]
        if begin == end:
            return np.empty(self.shapes[name], self.dtypes[name])
        raw = np.memmap(self.source, np.uint8, "r", begin, (end - begin,))
        return np.asarray(raw).view(self.dtypes[name]).reshape(self.shapes[name])


def open_safetensors(path: Path) -> SafetensorsWeights:
    """Opens one safetensors file without reading a tensor.

    Raises:
      ValueError: not safetensors, truncated, or a dtype that is not a number we know.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
        with path.open("rb") as raw:
            (length,) = struct.unpack("<Q", raw.read(8))
            header = json.loads(raw.read(length))
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is not a whole safetensors file: {error}.") from error
    header.pop("__metadata__", None)
    for name, tensor in header.items():
        if tensor["dtype"] not in _KNOWN:
            raise ValueError(f"{path}: {name} is stored as {tensor['dtype']}; known are {', '.join(_KNOWN)}.")
    return SafetensorsWeights(
        str(path),
        {name: tuple(tensor["shape"]) for name, tensor in header.items()},
        {name: _KNOWN[tensor["dtype"]] for name, tensor in header.items()},
        metadata,
        {name: tuple(8 + length + at for at in tensor["data_offsets"]) for name, tensor in header.items()},
    )
