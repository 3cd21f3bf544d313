"""What the encoders that are networks share: their published files, and batches split over this process's devices.

Parameters lie whole on every local device, and each device runs a part of every batch. All batches have one size, so a
network compiles once for each shape of its rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from refalign_jax.types import Params


class Resident:
    """Parameters in the devices' memory, read when they are first needed and again after `release`.

    Args:
      read: reads them.
    """

    def __init__(self, read: Callable[[], Params]) -> None:
        self._read = read
        self._params: Params | None = None

    def __call__(self) -> Params:
        """Returns the parameters."""
        if self._params is None:
            self._params = self._read()
        return self._params

    @property
    def is_loaded(self) -> bool:
        """Whether they are in memory."""
        return self._params is not None

    def release(self) -> None:
        """Frees their memory."""
        self._params = None


def find_file(path: Path, candidates: Sequence[str]) -> Path:
    """Returns the first candidate that a folder has ("." is the folder itself); a file is returned as it is."""
    if path.is_file():
        return path
    return next(path / name for name in candidates if (path / name).exists())


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
