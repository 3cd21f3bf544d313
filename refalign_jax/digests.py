"""SHA-256 of the contents of files, by which a result knows its inputs.

A file is read once. Afterwards its digest comes from a cache as long as its size, its times of modification and of
status change, and its inode are what they were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath
from tqdm import tqdm

from refalign_jax import remote

CACHE = ".digests.jsonl"
"""The cache's file in a folder of results."""

_RACY_NS = 2_000_000_000
"""A file that was changed in the last 2 s is not cached: a clock's tick may hide that it is changed again."""


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON value, hexadecimal, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Digests:
    """Digests of files, cached in a file of the folder of results; a context manager that closes the cache.

    The cache holds one line per file, the last one counts. It is an aid: where it is damaged or can't be written, files
    are read again.

    Args:
      folder: of the results; it need not exist before the first digest. Remote folders have no cache.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._path = None if remote.is_remote(folder) else Path(folder) / CACHE
        self._known: dict[str, tuple[list[int], str]] = {}
        self._checked: dict[str, str] = {}
        self._file: Any = None
        self._unwritten: list[bytes] = []
        self._guard = threading.Lock()
        if self._path is not None and self._path.is_file():
            for line in self._path.read_bytes().split(b"\n"):
                self._read(line)

    def _read(self, line: bytes) -> None:
        """Takes a line of the cache; one that was cut or damaged is passed over."""
        try:
            name, state, digest = json.loads(line)
            if len(digest) == 64 and len(state) == 4:
                self._known[name] = state, digest
        except (ValueError, TypeError, RecursionError):
            pass

    def file(self, path: str | os.PathLike[str]) -> str:
        """Digest of a file, hexadecimal; looked up once in this object's life.

        Raises:
          ValueError: it does not exist or is no regular file.
          OSError: it can't be read.
        """
        name = os.fspath(path) if remote.is_remote(path) else os.path.abspath(path)
        if name not in self._checked:
            self._checked[name] = self._remote(name) if remote.is_remote(name) else self._local(name)
        return self._checked[name]

    def forget(self, path: str | os.PathLike[str]) -> None:
        """Looks a file up again at the next call, because this process has written it."""
        self._checked.pop(os.path.abspath(path), None)

    def _local(self, name: str) -> str:
        try:
            found = os.stat(name)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{name} does not exist.") from error
        if not stat.S_ISREG(found.st_mode):  # opening a FIFO would wait for ever
            raise ValueError(f"{name} is not a regular file.")
        state = _state(found)
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known[1]
        with open(name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            quiet = time.time_ns() - max(found.st_mtime_ns, found.st_ctime_ns) > _RACY_NS
            if quiet and _state(os.fstat(file.fileno())) == state:
                self._remember(name, state, digest)
        return digest

    def part(self, name: str, places: Sequence[str], read: Callable[[], bytes]) -> str:
        """Digest of bytes that lie within files, hexadecimal; read again only where these files have changed.

        Args:
          name: identifies the bytes.
          places: the files, local ones.
          read: reads the bytes.

        Raises:
          ValueError: a file does not exist, or `read` raises it.
        """
        try:
            states = [_state(os.stat(place)) for place in places]
        except OSError as error:
            raise ValueError(f"{error.filename} can't be read: {error.strerror}.") from error
        state = [sum(column) for column in zip(*states, strict=True)]
        known = self._known.get(name)
        if known is not None and known[0] == state:
            return known[1]
        digest = hashlib.sha256(read()).hexdigest()
        if time.time_ns() - max(max(state[1:3]) for state in states) > _RACY_NS:
            self._remember(name, state, digest)
        return digest

    def _remote(self, name: str) -> str:
        with epath.Path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def tree(self, path: str | os.PathLike[str]) -> str:
        """Digest of a file, or of a folder: that of the names and digests of its files, hidden ones left out.

        Raises:
          ValueError: nothing is there, or a folder without files.
          OSError: a file can't be read.
        """
        place = epath.Path(path)
        if not place.is_dir():
            return self.file(path)
        names = _walk(place, "")
        if not names:
            raise ValueError(f"{place} holds no file.")
        bar = tqdm(sorted(names), desc=f"SHA-256 of {place.name}", unit="file", delay=5)
        return digest_json([[name, self.file(place / name)] for name in bar])

    def _remember(self, name: str, state: list[int], digest: str) -> None:
        """Enters a digest into the cache."""
        self._known[name] = state, digest
        with self._guard:
            self._unwritten.append(b"\n" + json.dumps([name, state, digest]).encode())
            self._write()

    def _write(self) -> None:
        """Writes what the cache lacks, if its folder exists by now."""
        if self._path is None or not self._unwritten or not self._path.parent.is_dir():
            return
        with contextlib.suppress(OSError):
            self._file = self._file or self._path.open("ab")
            self._file.write(b"".join(self._unwritten))
            self._file.flush()
        self._unwritten.clear()

    def close(self) -> None:
        """Closes the cache's file."""
        with self._guard, contextlib.suppress(OSError):
            self._write()
            if self._file is not None:
                self._file.close()
                self._file = None

    def __enter__(self) -> Digests:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ between two objects, those that only one has included, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _state(found: os.stat_result) -> list[int]:
    """What changes when a file does."""
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _walk(folder: epath.Path, prefix: str) -> list[str]:
    """Names of all files below a folder, without hidden ones."""
    names: list[str] = []
    for path in folder.iterdir():
        if not path.name.startswith("."):
            names += _walk(path, f"{prefix}{path.name}/") if path.is_dir() else [prefix + path.name]
    return names
