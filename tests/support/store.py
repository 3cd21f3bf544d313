"""An object store in this process's memory that answers for `gs://`, in place of Google's."""

from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

BUCKET = "bucket"
"""The one bucket that there is."""


class HttpError(Exception):
    """What gcsfs raises where it has no word of Python's for a status."""

    __module__ = "gcsfs.retry"

    def __init__(self, code: int, message: str) -> None:
        super().__init__(f"{message}, {code}")
        self.code = code


class MemoryStore(MemoryFileSystem):
    """Objects by their names, as gcsfs shows them: folders are nothing, and errors have no number."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    refuses: ClassVar[Exception | None] = None
    """What every request is answered with."""

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

    def _answer(self, path):
        """Raises what the service would answer to any request for a path."""
        if self.refuses is not None:
            raise self.refuses
        name = self._strip_protocol(path)
        if name.split("/")[1] != BUCKET:
            raise FileNotFoundError(f"b{name}/o")

    def find(self, path, maxdepth=None, withdirs=False, **kwargs):
        self._answer(path)
        return super().find(path, maxdepth=maxdepth, withdirs=withdirs, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        self._answer(path)
        return super()._open(path, mode=mode, **kwargs)

    def info(self, path, **kwargs):
        self._answer(path)
        return super().info(path, **kwargs)

    def exists(self, path, **kwargs):
        try:
            return bool(self.info(path))
        except FileNotFoundError:
            return False

    def makedirs(self, path, exist_ok=False):
        """Nothing: there are no folders."""

    mkdir = makedirs


def empty(monkeypatch) -> type[MemoryStore]:
    """Empties the store for one test; what it holds is in its `store`, by names such as `/bucket/folder/file`."""
    monkeypatch.setattr(MemoryStore, "store", {})
    monkeypatch.setattr(MemoryStore, "pseudo_dirs", [""])
    return MemoryStore


for protocol in MemoryStore.protocol:
    fsspec.register_implementation(protocol, MemoryStore, clobber=True)
