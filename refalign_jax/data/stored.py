"""Files that are not paths: at a URL, or inside of an archive that may be cut into pieces.

`Stored` names the bytes and reads them; it can be pickled, so that another process may read them. Local files are
opened as they are. URLs are those of fsspec, such as `gs://bucket/part.tar` or `https://…`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from refalign_jax import remote

Piece = tuple[str, int, int | None]
"""A path or URL, the first byte in it, and the number of bytes; None for all that follow."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A file that lies at a URL or within others."""

    name: str
    """What messages call it."""
    pieces: tuple[Piece, ...]
    """Where its bytes are, in their order."""

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        """Returns its contents; those of the last few are kept.

        Raises:
          ValueError: it can't be read, or is shorter than stated.
        """
        return _read_pieces(self.name, self.pieces)


File = Path | Stored
"""Where a file is."""


def need(package: str) -> ModuleType:
    """Imports a package that only real data needs.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.split(".")[0]
        raise ValueError(
            f"The package {name} is not installed; install what real data needs: pip install -e '.[data]'."
        ) from error


def file_at(place: str, folder: Path) -> File:
    """The file at a URL, or at a path relative to a folder."""
    return Stored(place, ((place, 0, None),)) if remote.is_remote(place) else folder / place


def open_bytes(place: str) -> Any:
    """Opens a local path or a URL for reading; the file can seek.

    Raises:
      ValueError: it can't be opened.
    """
    try:
        return need("fsspec").open(place, "rb").open() if remote.is_remote(place) else open(place, "rb")
    except Exception as error:
        raise _unreadable(place, error) from error


def _unreadable(place: str, error: Exception) -> Exception:
    """The error to raise where a file can't be read: a sentence where the system or a store has answered."""
    if isinstance(error, FileNotFoundError):
        return ValueError(f"{place} does not exist.")
    if isinstance(error, OSError | ImportError) or remote.is_answer(error):
        return ValueError(f"{place} can't be read: {remote.reason(error)}.")
    return error


def size_of(place: str) -> int:
    """Number of bytes of a local path or a URL.

    Raises:
      ValueError: it can't be reached.
    """
    try:
        if not remote.is_remote(place):
            return os.stat(place).st_size
        system, path = need("fsspec").core.url_to_fs(place)
        return int(system.size(path))
    except TypeError as error:
        raise ValueError(f"{place} can't be read: its server does not say how long it is.") from error
    except Exception as error:
        raise _unreadable(place, error) from error


@functools.lru_cache(maxsize=4)
def _read_pieces(name: str, pieces: tuple[Piece, ...]) -> bytes:
    """Reads and joins pieces."""
    found = []
    for place, start, length in pieces:
        try:
            with open_bytes(place) as file:
                file.seek(start)
                part = file.read() if length is None else file.read(length)
        except Exception as error:
            raise _unreadable(name, error) from error
        if length is not None and len(part) < length:
            raise ValueError(f"{name} is cut: {len(part)} of {length} bytes are in {place}.")
        found.append(part)
    return b"".join(found)


class JoinedFile(io.RawIOBase):
    """Files read as if they were one, such as an archive that was split.

    Args:
      places: local paths or URLs, in order.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self._places = list(places)
        self._sizes = [size_of(place) for place in places]
        *self._starts, self.size = itertools.accumulate(self._sizes, initial=0)
        self._at, self._open = 0, -1
        self._file: Any = io.BytesIO()

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The place from which is read next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets the place from which is read next."""
        base = (0, self._at, self.size)[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Reads up to the end of the piece at hand."""
        if self._at >= self.size:
            return 0
        index = bisect.bisect_right(self._starts, self._at) - 1
        if index != self._open:
            self._file.close()
            self._file, self._open = open_bytes(self._places[index]), index
        start = self._starts[index]
        self._file.seek(self._at - start)
        part = self._file.read(min(len(buffer), start + self._sizes[index] - self._at))
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def pieces(self, start: int, length: int) -> tuple[Piece, ...]:
        """Where the bytes of a span lie in the files that are joined."""
        found: list[Piece] = []
        for place, size, first in zip(self._places, self._sizes, self._starts, strict=True):
            low, high = max(start, first), min(start + length, first + size)
            if low < high:
                found.append((place, low - first, high - low))
        return tuple(found)

    def close(self) -> None:
        """Closes the file that is open."""
        self._file.close()
        super().close()
