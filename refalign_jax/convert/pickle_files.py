"""Published torch checkpoints (`.pth`, `.pt`) read without executing their pickle and without torch.

Since torch 1.6 a checkpoint is a zip: `<folder>/data.pkl`, a pickle of the dict in which each tensor is a call of
`torch._utils._rebuild_tensor_v2` on a storage, and `<folder>/data/<key>`, the bytes of each storage. A pickle can call
any function that it can name, so loading one runs whatever its author wished. Here a name is looked up in a short list
and nowhere else: it becomes a record of where a tensor lies, and any other name is refused before it could be called.
"""

from __future__ import annotations

import collections
import dataclasses
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
"""The storage types of module `torch` that a pickle may name, and their element types."""

NESTED = ("state_dict", "model")
"""Keys under which a checkpoint may hold the weights beside other things."""

MOST_PICKLE_BYTES = 256 * 2**20
"""A pickle of names and shapes alone is far smaller; a larger one is not read into memory."""


# What a pickle gets hold of are tuples, because nothing in a pickle can alter a tuple: an object with a `__dict__` or a
# `__setstate__` could be changed after it was checked.
class _StorageType(NamedTuple):
    """Stands for a storage type of torch."""

    name: str


class _Storage(NamedTuple):
    """A run of `length` elements in the zip's `data/<key>`."""

    dtype: np.dtype
    key: str
    length: int


class _Tensor(NamedTuple):
    """A strided view of a storage; offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def span(self) -> int:
        """Elements from the first to the last that the view touches."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))


class _RefusedError(ValueError):
    """A refusal that already says in a sentence what is wrong."""


class _RebuildTensor:
    """Stands for `torch._utils._rebuild_tensor_v2`; without a `__dict__`, so that a pickle can't alter it."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
        """Records the view, after checking that it lies inside its storage."""
        numbers = (offset, *shape, *strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise TypeError("a tensor is built from something else than a storage, a shape and as many strides")
        if any(type(n) is not int or n < 0 for n in numbers):
            raise TypeError(f"a tensor has offset {offset}, shape {shape}, strides {strides}")
        tensor = _Tensor(storage, offset, tuple(shape), tuple(strides))
        if tensor.span and offset + tensor.span > storage.length:
            raise TypeError(f"a tensor of shape {shape} reaches beyond its storage of {storage.length} elements")
        return tensor


class _Unpickler(pickle.Unpickler):
    """An unpickler that knows ten storage types, a dict and a record, and can call nothing else."""

    def __init__(self, file: IO[bytes], source: str) -> None:
        super().__init__(file)
        self.source = source

    def find_class(self, module: str, name: str) -> Any:
        """Looks a global up in our list alone; nothing is imported."""
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _RebuildTensor()
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            return _StorageType(name)
        raise _RefusedError(
            f"{self.source} names {module}.{name}, which is not part of a plain dict of tensors; it was refused and "
            "nothing was run."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """Reads ("storage", type, key, device, elements)."""
        kind, storage_type, key, _, length = pid
        if (
            kind != "storage"
            or type(storage_type) is not _StorageType
            or type(key) is not str
            or type(length) is not int
        ):
            raise TypeError(f"{pid!r:.80} is not a storage")
        return _Storage(STORAGES[storage_type.name], key, length)


@dataclasses.dataclass(frozen=True)
class PickleWeights:
    """Tensors of one torch checkpoint. Implements `table.Tensors`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    tensors: Mapping[str, _Tensor]
    folder: str

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as stored (read-only); only the bytes it spans are read.

        Raises:
          ValueError: the bytes are damaged.
        """
        tensor = self.tensors[name]
        dtype = tensor.storage.dtype
        try:
            with (
                zipfile.ZipFile(self.source) as archive,
                archive.open(f"{self.folder}data/{tensor.storage.key}") as file,
            ):
                file.seek(tensor.offset * dtype.itemsize)
                data = np.frombuffer(file.read(tensor.span * dtype.itemsize), dtype)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.source}: the bytes of {name} are damaged: {error}.") from error
        steps = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(data, tensor.shape, steps, writeable=False)


def open_pickle_weights(path: str | Path) -> PickleWeights:
    """Opens a torch checkpoint without executing its pickle and without reading a tensor.

    Args:
      path: a zip checkpoint of a plain dict of name to tensor, by itself or under "state_dict" or "model".

    Raises:
      ValueError: no such file, not a zip, truncated or damaged, a pickle that names anything but tensors, or no
        dict of tensors inside.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a torch checkpoint.")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(4)
        if start == b"PK\x03\x04":
            raise ValueError(f"{path} ({path.stat().st_size} bytes) is a truncated torch checkpoint.")
        raise ValueError(f"{path} is not a zip checkpoint; one from before torch 1.6 must be saved again by torch.")
    try:
        with zipfile.ZipFile(path) as archive:
            folder, content = _unpickle(path, archive)
            tensors = _state_dict(path, content)
            _check_storages(path, archive, folder, tensors)
    except _RefusedError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"{path} is a damaged torch checkpoint: {error}.") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.storage.dtype for name, tensor in tensors.items()}
    return PickleWeights(str(path), shapes, dtypes, tensors, folder)


def _unpickle(path: Path, archive: zipfile.ZipFile) -> tuple[str, Any]:
    """The zip's folder, "" or ending in "/", and what its pickle describes."""
    names = archive.namelist()
    found = [name for name in names if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)]
    if len(found) != 1:
        raise _RefusedError(f"{path} is a zip with {len(found)} files data.pkl; a torch checkpoint has one.")
    folder = found[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
        raise _RefusedError(f"{path} holds big-endian numbers; only little-endian checkpoints are read.")
    if archive.getinfo(found[0]).file_size > MOST_PICKLE_BYTES:
        raise _RefusedError(
            f"{path} has a pickle of more than {MOST_PICKLE_BYTES} bytes, far beyond a list of tensors."
        )
    with archive.open(found[0]) as file:
        return folder, _Unpickler(file, str(path)).load()


def _state_dict(path: Path, content: Any) -> dict[str, _Tensor]:
    """The dict of tensors: the content itself or what it holds under one of `NESTED`."""
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise _RefusedError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    wrong = [str(name) for name, value in content.items() if type(name) is not str or not isinstance(value, _Tensor)]
    if wrong:
        raise _RefusedError(
            f"{path} is not a plain dict of tensors, by itself or under {' or '.join(NESTED)}: {wrong[:4]} are not "
            "tensors."
        )
    if not content:
        raise _RefusedError(f"{path} holds no tensor.")
    return dict(content)


def _check_storages(path: Path, archive: zipfile.ZipFile, folder: str, tensors: Mapping[str, _Tensor]) -> None:
    """Raises ValueError unless every storage is in the zip with the bytes its tensors count on."""
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    for name, tensor in tensors.items():
        need = tensor.storage.length * tensor.storage.dtype.itemsize
        have = sizes.get(f"{folder}data/{tensor.storage.key}")
        if have != need:
            raise _RefusedError(f"{path}: the storage of {name} has {have or 0} bytes, not {need}.")
