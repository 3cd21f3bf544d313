"""Files are there whole or not at all, and what killed processes left is removed."""

import os
import subprocess
import sys

import pytest
from etils import epath

from refalign_jax.atomic import atomic_write, partial_path, remove_partials, write_text


def test_a_file_appears_when_it_is_whole(tmp_path):
    with atomic_write(tmp_path / "f") as temporary:
        temporary.write_text("x")
        assert not (tmp_path / "f").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_was_there_stays_when_the_block_raises(tmp_path):
    write_text(tmp_path / "f", "before")
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "f") as temporary:
        temporary.write_text(f"after {1 / 0}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"f": "before"}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    mine = partial_path(epath.Path(tmp_path) / "f[1]").name
    for process in (gone.pid, 1):
        (tmp_path / mine.replace(f"-{os.getpid()}.", f"-{process}.")).write_text("half")
    (tmp_path / mine.replace(f"-{os.getpid()}.", f"-{gone.pid}.") / "x").parent.with_suffix(".partial.more").mkdir()
    others = [
        partial_path(epath.Path(tmp_path) / "g").name.replace(str(os.getpid()), str(gone.pid)),
        ".f[1].12.partial",
    ]
    for name in others:
        (tmp_path / name).write_text("half")
    write_text(tmp_path / "f[1]", "whole")
    left = mine.replace(f"-{os.getpid()}.", "-1.")  # that process exists
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["f[1]", left, *others])
    remove_partials(epath.Path("gs://nothing/f"))
