"""Digests follow contents, whatever hides a change, and files are read once."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from refalign_jax import digests
from refalign_jax.digests import CACHE, Digests


def aged(path, seconds=100):
    """Sets a file's time of modification back."""
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_contents_decide_even_where_size_and_time_are_kept(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    aged(path)
    before = path.stat()
    with Digests(tmp_path) as found:
        assert found.file(path) == hashlib.sha256(b"one").hexdigest()
    path.write_text("two")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with Digests(tmp_path) as found:
        assert found.file(path) == hashlib.sha256(b"two").hexdigest()


def test_an_unchanged_file_is_not_read_again_and_a_damaged_cache_is_harmless(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_RACY_NS", -(10**18))  # as if files were old
    path = tmp_path / "a"
    path.write_text("one")
    with Digests(tmp_path) as found:
        digest = found.file(path)
    cache = tmp_path / CACHE
    assert len(cache.read_text().splitlines()) == 2
    cache.write_text(cache.read_text() + '\n{"torn')

    def forbidden(*_):
        raise AssertionError("read again")

    with monkeypatch.context() as patched:
        patched.setattr(digests.hashlib, "file_digest", forbidden)
        with Digests(tmp_path) as found:
            assert found.file(path) == digest
    cache.write_bytes(b"\xff[1]\n[1,2,3]\n{}\n" + b"[" * 10000)
    with Digests(tmp_path) as found:
        assert found.file(path) == digest


def test_a_folder_is_the_digest_of_its_files(tmp_path):
    folder = tmp_path / "d"
    (folder / "b").mkdir(parents=True)
    (folder / "a").write_text("one")
    (folder / "b" / "c").write_text("two")
    before = Digests(tmp_path).tree(folder)
    (folder / ".lock").write_text("hidden")
    assert Digests(tmp_path).tree(folder) == before
    (folder / "a").rename(folder / "z")
    assert Digests(tmp_path).tree(folder) != before
    assert Digests(tmp_path).tree(folder / "z") == hashlib.sha256(b"one").hexdigest()


def test_what_has_no_digest_is_named(tmp_path):
    found = Digests(tmp_path)
    with pytest.raises(ValueError, match="none does not exist"):
        found.file(tmp_path / "none")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(ValueError, match="is not a regular file"):
            found.file(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no file"):
        found.tree(tmp_path / "empty")
