"""Published torch checkpoints (`.pth`, `.pt`, `.bin`) read without executing their pickle and without torch.

Since torch 1.6 a checkpoint is a zip: `<folder>/data.pkl`, a pickle of the dict of tensors, and `<folder>/data/<key>`,
the bytes of each storage, uncompressed. Before, it was a row of five pickles (a magic number, a version, the sizes of
C's types, the dict, the keys of the storages in order) and behind them each storage, its number of elements before it.
Both are read; the pickles by `pickle_reader`, which can call nothing. Nothing is read before its size is checked.
"""

from __future__ import annotations

import dataclasses
import io
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.convert.pickle_reader import (
    MOST_PICKLE_BYTES,
    Pickle,
    RefusedError,
    Storage,
    Tensor,
    read_pickle,
)

NESTED = ("state_dict", "model")
"""Keys under which a checkpoint may hold the weights beside other things."""

MOST_DIRECTORY_BYTES = 16 * 2**20
"""A zip's list of its files; a checkpoint has one file of some 100 bytes there for each tensor."""

_MAGIC = 0x1950A86A20F9469CFC6C
_MAGIC_BYTES = _MAGIC.to_bytes(10, "little")
_VERSION = 1001


@dataclasses.dataclass(frozen=True)
class PickleWeights:
    """Tensors of one torch checkpoint. Implements `table.Tensors`."""

    source: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, np.dtype]
    tensors: Mapping[str, Tensor]
    places: Mapping[str, str | int]
    """Where each storage lies, by its key: a name in the zip, or an offset in a file from before torch 1.6."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Torch's files have none."""
        return {}

    def read(self, name: str) -> np.ndarray:
        """Returns one tensor as stored (read-only); only the bytes it spans are read.

        Raises:
          ValueError: the bytes are damaged.
        """
        tensor = self.tensors[name]
        begin, size = (n * tensor.dtype.itemsize for n in (tensor.offset, tensor.span))
        try:
            data = np.frombuffer(self._bytes(self.places[tensor.storage.key], begin, size), tensor.dtype)
        except (zipfile.BadZipFile, OSError, EOFError, ValueError) as error:
            raise ValueError(f"{self.source}: the bytes of {name} are damaged: {error}.") from error
        steps = tuple(stride * tensor.dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(data, tensor.shape, steps, writeable=False)

    def _bytes(self, place: str | int, begin: int, size: int) -> bytes:
        if isinstance(place, int):
            with Path(self.source).open("rb") as file:
                file.seek(place + begin)
                return file.read(size)
        with zipfile.ZipFile(self.source) as archive, archive.open(place) as file:
            file.seek(begin)
            return file.read(size)


def open_pickle_weights(path: str | Path) -> PickleWeights:
    """Opens a torch checkpoint without executing its pickle and without reading a tensor.

    Args:
      path: a checkpoint of a plain dict of name to tensor, by itself or under "state_dict" or "model".

    Raises:
      ValueError: no such file, no torch checkpoint, truncated or damaged, larger within than it can be, a pickle that
        names anything but tensors, or no dict of tensors inside.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is not a file; expected a torch checkpoint.")
    with path.open("rb") as file:
        start = file.read(64)
    is_zip = _is_zip(path)
    if not is_zip and start[:4] == b"PK\x03\x04":
        raise ValueError(f"{path} ({path.stat().st_size} bytes) is a truncated torch checkpoint.")
    if not is_zip and _MAGIC_BYTES not in start:
        raise ValueError(f"{path} is no torch checkpoint: neither a zip nor the format from before torch 1.6.")
    try:
        tensors, places = _open_zip(path) if is_zip else _open_legacy(path)
    except RefusedError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        reason = "its pickle asks for what is not there" if isinstance(error, LookupError) else str(error).rstrip(".")
        raise ValueError(f"{path} is a damaged torch checkpoint: {reason}.") from error
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    return PickleWeights(str(path), shapes, dtypes, tensors, places)


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile as error:  # raised where the end of a zip is there, but damaged
        raise ValueError(f"{path} is a damaged torch checkpoint: {error}.") from error


def _open_zip(path: Path) -> tuple[dict[str, Tensor], dict[str, str | int]]:
    """Reads the pickle in a zip and checks every storage that its tensors count on."""
    _check_directory(path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        found = [
            name for name in entries if name == "data.pkl" or (name.endswith("/data.pkl") and name.count("/") == 1)
        ]
        if len(found) != 1:
            raise RefusedError(f"{path} is a zip with {len(found)} files data.pkl; a torch checkpoint has one.")
        folder = found[0].removesuffix("data.pkl")
        _check_entries(path, entries, folder)
        byteorder = entries.get(f"{folder}byteorder")
        if byteorder and archive.read(byteorder) != b"little":
            raise RefusedError(f"{path} holds big-endian numbers; only little-endian checkpoints are read.")
        tensors = _state_dict(path, read_pickle(io.BytesIO(archive.read(found[0])), str(path)).content)
    places: dict[str, str | int] = {}
    for name, tensor in tensors.items():
        entry = entries.get(f"{folder}data/{tensor.storage.key}")
        _check_storage(path, name, tensor.storage, entry.file_size if entry else 0)
        places[tensor.storage.key] = f"{folder}data/{tensor.storage.key}"
    return tensors, places


def _check_directory(path: Path) -> None:
    """Raises ValueError where a zip's list of its files is so long that reading it takes more memory than they do."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**17))
        end = file.read()
    for mark, at, kind, unknown in ((b"PK\x05\x06", 12, "<L", 2**32 - 1), (b"PK\x06\x06", 40, "<Q", 2**64 - 1)):
        for match in re.finditer(re.escape(mark), end):
            field = end[match.start() + at :][: struct.calcsize(kind)]
            size = struct.unpack(kind, field)[0] if len(field) == struct.calcsize(kind) else 0
            if MOST_DIRECTORY_BYTES < size != unknown:
                raise RefusedError(f"{path} is a zip with {size:,} bytes of file names, far beyond one a tensor.")


def _check_entries(path: Path, entries: Mapping[str, zipfile.ZipInfo], folder: str) -> None:
    """Checks that the zip's files lie uncompressed in it, as torch stores them, and that its pickle is small."""
    size = path.stat().st_size
    for name, entry in entries.items():
        if not name.startswith(folder):
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise RefusedError(
                f"{path} holds {name!r:.80} compressed, {entry.compress_size:,} bytes for {entry.file_size:,}; torch "
                "stores uncompressed, so it was refused unread."
            )
        if entry.file_size > size:
            raise RefusedError(f"{path} has {size:,} bytes and claims {entry.file_size:,} for {name!r:.80}.")
    if entries[f"{folder}data.pkl"].file_size > MOST_PICKLE_BYTES:
        raise RefusedError(f"{path} has a pickle of more than {MOST_PICKLE_BYTES} bytes, far beyond a list of tensors.")
    for name in ("byteorder", "version"):
        if f"{folder}{name}" in entries and entries[f"{folder}{name}"].file_size > 64:
            raise RefusedError(f"{path} has a file {name} of more than 64 bytes; it holds a word.")


def _open_legacy(path: Path) -> tuple[dict[str, Tensor], dict[str, str | int]]:
    """Reads the five pickles of a file from before torch 1.6 and finds the storages behind them."""
    with path.open("rb") as stream:
        file = io.BytesIO(stream.read(MOST_PICKLE_BYTES))
        magic, version, system, (content, storages), keys = _five_pickles(file, str(path))
        if magic != _MAGIC or version != _VERSION:
            raise RefusedError(f"{path} is of version {version!s:.20} of torch's old format; only {_VERSION} is read.")
        if type(system) is not dict or system.get("little_endian") is not True:
            raise RefusedError(f"{path} holds big-endian numbers; only little-endian checkpoints are read.")
        if type(keys) is not list or any(type(key) is not str for key in keys) or len(set(keys)) != len(keys):
            raise TypeError("its list of storages is no list of names")
        tensors = _state_dict(path, content)
        names = {tensor.storage.key: name for name, tensor in tensors.items()}
        places: dict[str, str | int] = {}
        at, size = file.tell(), path.stat().st_size
        for key in keys:
            if key not in storages:
                raise RefusedError(f"{path} holds a storage {key:.40} that is of no tensor.")
            name, storage = names.get(key, f"another tensor ({key:.40})"), storages[key]
            stream.seek(at)
            head = stream.read(8)
            length = struct.unpack("<q", head)[0] if len(head) == 8 else 0
            if length != storage.length:
                _check_storage(path, name, storage, length * storage.dtype.itemsize)
            places[key] = at + 8
            at += 8 + length * storage.dtype.itemsize
            if at > size:
                _check_storage(path, name, storage, size - int(places[key]))
    for name, tensor in tensors.items():
        if tensor.storage.key not in places:
            _check_storage(path, name, tensor.storage, 0)
            places[tensor.storage.key] = size  # an empty tensor of an empty storage
    if at != size:
        raise RefusedError(f"{path} has {size - at} bytes behind its last tensor.")
    return tensors, places


def _five_pickles(file: io.BytesIO, source: str) -> tuple[Any, Any, Any, Pickle, Any]:
    """The magic number, the version, the sizes of C's types, the content, and the keys of its storages."""
    first = [read_pickle(file, source).content for _ in range(3)]
    return (*first, read_pickle(file, source), read_pickle(file, source).content)


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    """The dict of tensors: the content itself or what it holds under one of `NESTED`."""
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise RefusedError(f"{path} holds a {type(content).__name__}, not a dict of tensors.")
    wrong = [f"{name!s:.60}" for name, value in content.items() if type(name) is not str or type(value) is not Tensor]
    if wrong:
        raise RefusedError(
            f"{path} is not a plain dict of tensors, by itself or under {' or '.join(NESTED)}: {wrong[:4]} are not "
            "tensors."
        )
    if not content:
        raise RefusedError(f"{path} holds no tensor.")
    return dict(content)


def _check_storage(path: Path, name: str, storage: Storage, have: int) -> None:
    """Raises ValueError unless a storage has the bytes that its tensor counts on."""
    need = storage.length * storage.dtype.itemsize
    if have != need:
        raise RefusedError(f"{path}: the storage of {name} has {have} bytes, not {need}.")
