"""What the encoders that are networks share: their published files, and batches split over this process's devices.

Parameters lie whole on every local device, and each device runs a part of every batch. All batches have one size, so a
network compiles once for each shape of its rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refalign_jax.convert.files import open_weights
from refalign_jax.convert.pickle_files import open_pickle_weights
from refalign_jax.convert.table import Tensors
from refalign_jax.types import Params


def find_file(path: Path, candidates: Sequence[str]) -> Path:
    """Returns the first candidate that a folder has ("." is the folder itself); a file is returned as it is."""
    if path.is_file():
        return path
    return next(path / name for name in candidates if (path / name).exists())


def open_tensors(path: Path) -> Tensors:
    """Opens a torch checkpoint, a safetensors file, or a folder that holds either.

    Raises:
      ValueError: no such file, or one that is not whole.
    """
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        found = sorted(path.glob("*.pth"))
        if len(found) == 1:
            path = found[0]
    return open_pickle_weights(path) if path.suffix in (".pth", ".pt", ".bin") else open_weights(path)


def read_config(path: Path) -> dict[str, Any] | None:
    """Reads the config.json in a folder, or beside a file; None where there is none.

    Raises:
      ValueError: it is not a JSON object.
    """
    path = (path if path.is_dir() else path.parent) / "config.json"
    if not path.is_file():
        return None
    try:
        published = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(published, dict):
        raise ValueError(f"{path} holds a {type(published).__name__}, not an object.")
    return published


def replicate(params: Params) -> Params:
    """Puts parameters whole on every local device."""
    return jax.device_put(params, jax.sharding.NamedSharding(_local_mesh(), jax.sharding.PartitionSpec()))


def device_batch(batch_size: int) -> tuple[int, jax.sharding.Sharding]:
    """Returns the batch size rounded up to a multiple of the local devices, and the sharding of a batch over them."""
    devices = jax.local_device_count()
    sharding = jax.sharding.NamedSharding(_local_mesh(), jax.sharding.PartitionSpec("batch"))
    return math.ceil(batch_size / devices) * devices, sharding


def in_batches(run: Callable[[jax.Array], jax.Array], rows: np.ndarray, batch_size: int) -> np.ndarray:
    """Runs a network over rows, batch by batch.

    Args:
      run: the network, from a batch to as many results.
      rows: its inputs, at least one.
      batch_size: as `device_batch` takes it; the last batch is filled with zeros.

    Returns:
      The results, in order.
    """
    size, sharding = device_batch(batch_size)
    parts = []
    for start in range(0, len(rows), size):
        part = np.asarray(rows[start : start + size], np.float32)
        padded = np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), np.float32)])
        parts.append(np.asarray(run(jax.device_put(padded, sharding)))[: len(part)])
    return np.concatenate(parts)


def _local_mesh() -> jax.sharding.Mesh:
    return jax.sharding.Mesh(np.array(jax.local_devices()), ("batch",))
