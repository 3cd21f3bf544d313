"""Weights written as safetensors, a tensor at a time, whole or not at all.

The safetensors library has no writer that streams (`save_file` needs every tensor in memory at once), so this module
writes the format itself: 8 bytes of header length, a JSON header, the raw bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from refalign_jax.atomic import atomic_write
from refalign_jax.convert.safetensors_files import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_weights(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    max_shard_bytes: int = 10 * 10**9,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes tensors as safetensors, one at a time, whole or not at all.

    Up to `max_shard_bytes` there is one file, `path`; beyond, there are `<stem>-00001-of-0000N.safetensors` and an
    index beside them, as diffusers names them. Files appear under their names only after the last byte is on disk.

    Args:
      path: the file to write, ending in `.safetensors`.
      tensors: (name, array) in the order of `shapes`; consumed once.
      shapes: every name and shape, known beforehand because the header comes first.
      dtypes: every name and dtype.
      max_shard_bytes: the most a shard holds; a larger tensor gets a shard of its own.
      metadata: text to keep in the header of every file, by key.

    Returns:
      The files written.

    Raises:
      ValueError: `path` exists or has another suffix.
      OSError: the folder can't be written, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: the name of a weight file must end in .safetensors.")
    shards = _divide(shapes, dtypes, max_shard_bytes)
    stems = [f"{path.stem}-{i + 1:05d}-of-{len(shards):05d}" for i in range(len(shards))]
    paths = [path.with_name(f"{stem}.safetensors") for stem in stems] if len(shards) > 1 else [path]
    index = path.with_name(f"{path.stem}.safetensors.index.json")
    targets = [*paths, index] if len(shards) > 1 else paths
    for target in targets:
        if target.exists():
            raise ValueError(f"{target} exists; it is not overwritten. Name another file or remove it.")

    with contextlib.ExitStack() as stack:  # the index, entered first, takes its name last
        partial = {target: stack.enter_context(atomic_write(target)) for target in reversed(targets)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = iter(tensors)
            for shard, target in zip(shards, paths, strict=True):
                with partial[target].open("wb") as file:
                    _write_header(file, shard, shapes, dtypes, metadata or {})
                    for name in shard:
                        given, value = next(stream)
                        assert (given, value.shape, value.dtype) == (name, shapes[name], dtypes[name]), (given, name)
                        file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            if len(shards) > 1:
                partial[index].write_text(_index(shards, paths))
        except OSError as error:
            raise OSError(f"{path} could not be written: {error.strerror or error}; nothing was kept.") from error
    return targets


def _divide(
    shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype], max_shard_bytes: int
) -> list[dict[str, int]]:
    """Names and bytes of the tensors of each shard."""
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = math.prod(shape) * dtypes[name].itemsize
        if shards[-1] and sum(shards[-1].values()) + size > max_shard_bytes:
            shards.append({})
        shards[-1][name] = size
    return shards


def _index(shards: Sequence[Mapping[str, int]], paths: Sequence[Path]) -> str:
    """The index of a weight file in shards, as JSON."""
    weight_map = {name: path.name for shard, path in zip(shards, paths, strict=True) for name in shard}
    total = sum(sum(shard.values()) for shard in shards)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)


def _write_header(
    file: BinaryIO,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    metadata: Mapping[str, str],
) -> None:
    """Writes the length and the JSON header, padded to 8 bytes as the format asks."""
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, size in sizes.items():
        header[name] = {
            "dtype": _NAMES[dtypes[name]],
            "shape": list(shapes[name]),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
