"""Folders in object stores, such as `gs://bucket/folder`: whether they can be reached, and what went wrong in words.

etils' epath reads and writes them through fsspec, which needs one more package for each kind of store. ArrayRecord and
TensorStore reach `gs://` by themselves and find the same credentials.

gcsfs keeps listings and answers from them, so that it does not see what another process, or TensorStore in this one,
has written since. This is turned off before a store is opened.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs", "hf": "huggingface_hub"}
"""The stores that epath knows, by the beginning of their URLs, and the package through which fsspec reaches each."""

_OPTIONS: dict[str, dict[str, Any]] = {"gs": {"finalize_on_close": True}}
"""What epath opens a store with, so that both have one connection."""

_CLIENTS = ("gcsfs", "google", "aiohttp", "requests", "s3fs", "botocore", "adlfs", "azure")
"""Packages that raise errors of their own where a store does not answer, or refuses."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL and not one of the operating system's."""
    return "://" in os.fspath(path)


def file_system(url: str) -> Any:
    """fsspec's file system of an object store; it takes paths with or without their beginning.

    Raises:
      ValueError: the URL is not that of a store that epath knows, or the store's package is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme not in PACKAGES:
        known = ", ".join(f"{name}://" for name in PACKAGES)
        raise ValueError(f"{url} can't be reached: {scheme}:// is no object store that is known here ({known}).")
    import fsspec  # takes a tenth of a second, which local folders save

    fsspec.config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    try:
        return fsspec.filesystem(scheme, **_OPTIONS.get(scheme, {}))
    except ImportError as error:
        install = "-e '.[gs]'" if scheme == "gs" else PACKAGES[scheme]
        raise ValueError(
            f"{url} can't be reached: the package {PACKAGES[scheme]} is not installed; pip install {install}."
        ) from error


def check(place: str | os.PathLike[str]) -> None:
    """Checks that a folder in an object store can be listed; one that holds nothing can. Local folders pass.

    Raises:
      ValueError: the kind of store is not known, its package is not installed, there is no such bucket, or a name has a
        character that is not supported.
      OSError: the store can't be reached, or refuses the credentials.
    """
    if is_remote(place):
        _check(os.fspath(place).rstrip("/"))


@functools.cache
def _check(url: str) -> None:
    """`check`, once for each folder."""
    system = file_system(url)
    bucket = url.partition("://")[2].partition("/")[0]
    if not bucket:
        raise ValueError(f"{url} names no bucket; give a folder, as in gs://bucket/folder.")
    if set("#?") & set(url):  # Orbax would take what follows for another part of the URL, and write into another folder
        raise ValueError(f"{url} can't be used: names in an object store must have no # and no ? here.")
    try:
        system.find(f"{url}/.refalign")  # lists what begins like this, which is nothing, but not without the bucket
    except FileNotFoundError as error:
        raise ValueError(f"{url} can't be reached: there is no bucket {bucket}.") from error
    except Exception as error:  # each client has its own
        raise OSError(f"{url} can't be reached: {reason(error)}.") from error


def is_answer(error: BaseException) -> bool:
    """Whether an error is an object store's or its client's, and so says nothing that this package has worded."""
    if type(error).__module__.partition(".")[0] in _CLIENTS:
        return True
    if not isinstance(error, OSError) or error.errno is not None:
        return False
    return isinstance(error, FileNotFoundError | FileExistsError) or str(error).startswith("Forbidden:")


def reason(error: BaseException) -> str:
    """The cause of an error of an operating system or an object store, to be quoted in a sentence; no full stop."""
    stated = getattr(error, "strerror", None)
    if stated:
        return str(stated)
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, FileExistsError):
        return "it exists"
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0][:300]
    if text.startswith(("Forbidden:", "Bad Request:")):
        return f"the store does not allow it ({lines[-1][:300]})"
    if getattr(error, "code", None) == 401 or type(error).__module__.startswith("google.auth"):
        return f"the store wants other credentials ({text}); log in, as by gcloud auth application-default login"
    return text


def configure() -> None:
    """Settings of a command, to be made before a path is looked at.

    epath does not go through TensorFlow where that is installed, unless EPATH_USE_TF says so. The packages that reach
    stores log no traceback of an error that they raise as well.
    """
    os.environ.setdefault("EPATH_USE_TF", "false")
    for package in PACKAGES.values():
        logging.getLogger(package).addFilter(_without_traceback)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Whether a message has no traceback."""
    return not record.exc_info
