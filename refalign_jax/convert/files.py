"""Weight files: safetensors in one file or in shards with an index, read and written one tensor at a time.

The safetensors library reads. It has no writer that streams (`save_file` needs every tensor in memory at once), so
this module writes the format itself: 8 bytes of header length, a JSON header, the raw bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from refalign_jax.atomic import atomic_write

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

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_SUFFIX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class SafetensorsWeights:
    """Tensors of one safetensors file, or of the shards an index names. Implements `table.Tensors`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    files: Mapping[str, Path]

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as stored, mapped into memory read-only: only the parts that are used are read."""
        path = self.files[name]
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            begin, end = json.loads(file.read(length))[name]["data_offsets"]
            if begin == end:
                return np.empty(self.shapes[name], self.dtypes[name])
            raw = np.memmap(file, np.uint8, "r", 8 + length + begin, (end - begin,))
            return np.asarray(raw).view(self.dtypes[name]).reshape(self.shapes[name])


def open_weights(path: str | Path) -> SafetensorsWeights:
    """Opens published weights without reading a tensor.

    Args:
      path: a safetensors file, a `*.safetensors.index.json`, or a folder that holds either.

    Raises:
      ValueError: no such file, not safetensors, truncated, a shard that is missing or disagrees with its index,
        or a dtype that is not a number we know.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; expected a safetensors file, an index, or a folder that holds one.")
    if path.is_dir():
        path = _pick(path)
    if path.name.endswith(".json"):
        return _open_shards(path)
    shapes, dtypes = _header(path)
    return SafetensorsWeights(str(path), shapes, dtypes, dict.fromkeys(shapes, path))


def _pick(folder: Path) -> Path:
    """The index of a folder, else its one safetensors file."""
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder} holds {len(found)} files {pattern}; name one: {[p.name for p in found[:4]]}.")
        if found:
            return found[0]
    raise ValueError(f"{folder} holds no *.safetensors file and no *{INDEX_SUFFIX}.")


def _header(path: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, np.dtype]]:
    """Shapes and dtypes of one safetensors file, its structure checked by the library."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            names = {name: part.get_dtype() for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is not a whole safetensors file: {error}.") from error
    unknown = {name: dtype for name, dtype in names.items() if dtype not in DTYPES}
    if unknown:
        name, dtype = next(iter(unknown.items()))
        raise ValueError(f"{path}: {name} is stored as {dtype}; known are {', '.join(DTYPES)}.")
    return shapes, {name: DTYPES[dtype] for name, dtype in names.items()}


def _open_shards(index: Path) -> SafetensorsWeights:
    """Opens the shards that an index names and checks that they hold the tensors it lists."""
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: index.parent / shard for name, shard in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a safetensors index: it has no 'weight_map' of name to file.") from error
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, np.dtype] = {}
    for path in sorted(set(files.values())):
        if not path.exists():
            raise ValueError(f"{index} names the shard {path.name}, which is not beside it.")
        shard_shapes, shard_dtypes = _header(path)
        lacking = [name for name, file in files.items() if file == path and name not in shard_shapes]
        unlisted = [name for name in shard_shapes if files.get(name) != path]
        if lacking or unlisted:
            raise ValueError(
                f"{path} and {index.name} disagree: in the index alone {lacking[:4]}, "
                f"in the shard alone {unlisted[:4]}."
            )
        shapes |= shard_shapes
        dtypes |= shard_dtypes
    return SafetensorsWeights(str(index), shapes, dtypes, files)


def write_weights(
    path: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, np.dtype],
    max_shard_bytes: int = 10 * 10**9,
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
    index = path.with_name(path.stem + INDEX_SUFFIX)
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
                    _write_header(file, shard, shapes, dtypes)
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
) -> None:
    """Writes the length and the JSON header, padded to 8 bytes as the format asks."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
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
