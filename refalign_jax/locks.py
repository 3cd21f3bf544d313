"""One writer a folder: a lock that a second process, on this host or another, finds taken.

The lock is the file `.lock` in the folder. It names the process that holds it and exists as long as it is held. On a
local disk or NFS the process also holds a POSIX lock on it (`fcntl.lockf`), which the system releases when the process
ends, however it ends. Where a file system has no such locks, the file alone is the lock. That is a best effort: two
processes that start within the same second are kept apart by reading the file again.

In an object store the file alone is the lock too, but the store itself creates it only where there is none, so that of
two processes that start together one is refused. Two that take over the same left-over file are kept apart by reading
it again. A process that was suspended longer than a lease may lose its lock; it then logs an error.

A file that is left over is recognised:

    its process was on this host     the process no longer exists: the lock is taken over at once
    its process was on another       the holder touches the file every 10 s: it is taken over after 35 s without
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epath

from refalign_jax import remote

LOCK = ".lock"
"""The lock's file in a folder."""
BEAT_SECONDS = 10.0
"""Time between two signs of life of a holder."""
LEASE_SECONDS = 35.0
"""Time without a sign of life after which a holder on another host counts as gone."""

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system without locks answers."""
_held: set[str] = set()
_guard = threading.Lock()

logger = logging.getLogger(__name__)


class FolderInUseError(ValueError):
    """Another process writes into the folder; the message names it."""


@contextlib.contextmanager
def exclusive(folder: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Holds the lock of a folder while the block runs.

    Args:
      folder: local or `gs://`; made if it does not exist.
      what: what is done in it, for the message of a process that finds it taken, such as "a training run".

    Raises:
      FolderInUseError: another process, or another thread of this one, holds it.
      ValueError: there is no such bucket, or the package of its store is not installed.
      OSError: the folder can't be written.
    """
    remote.check(folder)
    place = epath.Path(folder)
    name = os.fspath(place) if remote.is_remote(place) else os.path.realpath(place)
    with _guard:
        if name in _held:
            raise FolderInUseError(f"{place} is in use by this very process already; it has one writer at a time.")
        _held.add(name)
    try:
        with _hold_remote(place, what) if remote.is_remote(place) else _hold_local(Path(place), what):
            yield
    finally:
        with _guard:
            _held.discard(name)


def check_free(folder: str | os.PathLike[str], what: str) -> None:
    """Raises what `exclusive` raises if a folder is in use, so that a long preparation does not begin in vain."""
    remote.check(folder)
    if not remote.is_remote(folder) and Path(folder).is_file():
        raise OSError(f"{folder} is a file; name a folder to write into.")
    if epath.Path(folder).exists():
        with exclusive(folder, what):
            pass


@contextlib.contextmanager
def _hold_local(folder: Path, what: str) -> Iterator[None]:
    """`exclusive` for a folder of the operating system's."""
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, certain = _lock(path)
    except FileExistsError as error:
        raise OSError(f"{folder} is a file; name a folder to write into.") from error
    except OSError as error:
        raise OSError(f"{folder} can't be written: {error.strerror or error}.") from error

    # Never open the file a second time in this process: closing it would release the POSIX lock.
    def read() -> str:
        return os.pread(descriptor, 4096, 0).decode(errors="replace")

    def write() -> None:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, _identity(what).encode(), 0)

    def sign_of_life() -> object:
        if certain:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # makes NFS ask the server
        return os.fstat(descriptor).st_mtime_ns

    try:
        _wait_until_gone(folder, read(), sign_of_life)
        write()
        if not certain:
            _confirm(folder, read)
        try:
            with _beating(lambda: os.utime(descriptor)):
                yield
        finally:
            if _is_file(descriptor, path):
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, bool]:
    """Opens and locks the file; returns its descriptor, and whether the file system has locks.

    Raises:
      FolderInUseError: another process has locked it.
      OSError: it can't be opened.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor, False
            text = os.pread(descriptor, 4096, 0).decode(errors="replace")
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _in_use(path.parent, _holder(text)) from error
            raise
        if _is_file(descriptor, path):
            return descriptor, True
        os.close(descriptor)  # a holder that left between the opening and the locking removed this file


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether a descriptor is that of the file under a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


@contextlib.contextmanager
def _hold_remote(folder: epath.Path, what: str) -> Iterator[None]:
    """`exclusive` for a folder in an object store."""
    path = os.fspath(folder / LOCK)
    system = remote.file_system(path)

    def read() -> str:
        try:
            return system.cat_file(path).decode(errors="replace")
        except FileNotFoundError:
            return ""

    def is_ours() -> bool:
        return _is_this_process(_holder(read()))

    def beat() -> None:
        if is_ours():
            system.pipe_file(path, _identity(what).encode())  # with the time, so that each is another text
        elif not lost.is_set():
            lost.set()
            logger.error("The lock of %s is no longer held by this process; another may write there too.", folder)

    lost = threading.Event()
    try:
        before = read()
        _wait_until_gone(folder, before, read)
        if before and read() == before:
            system.rm_file(path)
        try:
            system.pipe_file(path, _identity(what).encode(), mode="create")
        except FileExistsError as error:
            raise _in_use(folder, _holder(read())) from error
        if before:
            _confirm(folder, read)
    except Exception as error:
        if not remote.is_answer(error):
            raise
        raise OSError(f"{folder} can't be written: {remote.reason(error)}.") from error
    try:
        with _beating(beat):
            yield
    finally:
        try:
            if is_ours():
                system.rm_file(path)
        except Exception as error:
            logger.warning("%s can't be removed (%s); it is taken over as left over.", path, remote.reason(error))


def _identity(what: str) -> str:
    """Who holds the lock, as JSON."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps(
        {"host": socket.gethostname(), "pid": os.getpid(), "begun": begun(os.getpid()), "what": what, "time": now}
    )


def begun(pid: int) -> str:
    """When a process began, in a form that no other process of its number has; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def _holder(text: str) -> dict[str, Any]:
    """Reads what `_identity` wrote; empty where it is another text, such as that of a process killed while writing."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    names = ("host", "pid", "begun", "what", "time")
    return found if isinstance(found, dict) and all(name in found for name in names) else {}


def _wait_until_gone(folder: os.PathLike[str], text: str, sign_of_life: Callable[[], object]) -> None:
    """Returns if nobody holds the lock, at once or after `LEASE_SECONDS` without a sign of life.

    Raises:
      FolderInUseError: the holder lives.
    """
    found = _holder(text)
    if not found:
        return
    if found["host"] == socket.gethostname():
        if _lives(found):
            raise _in_use(folder, found)
        logger.info("%s was left by process %s, which is gone; it is taken over.", folder, found["pid"])
        return
    logger.info("%s is in use by %s; waiting for a sign of life.", folder, _name(found))
    first, deadline = sign_of_life(), time.monotonic() + LEASE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(1.0, LEASE_SECONDS / 10))
        if sign_of_life() != first:
            raise _in_use(folder, found)
    logger.info("%s gave none for %g s; %s is taken over.", _name(found), LEASE_SECONDS, folder)


def _lives(found: dict[str, Any]) -> bool:
    """Whether the process that an identity names exists on this host."""
    if not isinstance(found["pid"], int) or found["pid"] == os.getpid():
        return False  # this process holds no lock of this folder: the number was another's before
    try:
        os.kill(found["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's
    return begun(found["pid"]) == found["begun"]


def _confirm(folder: os.PathLike[str], read: Callable[[], str]) -> None:
    """Reads the lock's file again, where another process may have written it in the same moment."""
    time.sleep(1.0)
    found = _holder(read())
    if found and not _is_this_process(found):
        raise _in_use(folder, found)


def _is_this_process(found: dict[str, Any]) -> bool:
    """Whether an identity is this process's."""
    return (found.get("host"), found.get("pid")) == (socket.gethostname(), os.getpid())


@contextlib.contextmanager
def _beating(beat: Callable[[], None]) -> Iterator[None]:
    """Gives signs of life while the block runs."""
    end = threading.Event()

    def run() -> None:
        while not end.wait(BEAT_SECONDS):
            with contextlib.suppress(Exception):  # a store's client has errors of its own; the next beat may succeed
                beat()

    thread = threading.Thread(target=run, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def _name(found: dict[str, Any]) -> str:
    """A holder in words."""
    try:
        since = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found["time"])
        age = f", begun {max(since.total_seconds(), 0):.0f} s ago"
    except (ValueError, TypeError):
        age = ""
    return f"{found['what']} (process {found['pid']} on {found['host']}{age})"


def _in_use(folder: os.PathLike[str], found: dict[str, Any]) -> FolderInUseError:
    """The error that a folder is in use."""
    who = _name(found) if found else "another process"
    return FolderInUseError(f"{os.fspath(folder)} is in use by {who}; wait for it, stop it, or name another folder.")
