"""One writer a folder: who holds the lock is named, and what was left over is recognised."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from support.places import environment

from refalign_jax import locks
from refalign_jax.locks import LOCK, FolderInUseError, check_free, exclusive

HOLDER = """
import sys, time
from refalign_jax.locks import exclusive
with exclusive(sys.argv[1], "a test"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""
"""A program that holds a folder's lock for some seconds."""

COUNTER = """
import sys, time
from pathlib import Path
from refalign_jax.locks import FolderInUseError, exclusive
place, count = Path(sys.argv[1]), Path(sys.argv[1]) / "count"
while time.time() < float(sys.argv[2]):
    pass
done = 0
while done < int(sys.argv[3]):
    try:
        with exclusive(place, "counting"):
            value = int(count.read_text())
            time.sleep(0.001)
            count.write_text(str(value + 1))
            done += 1
    except FolderInUseError:
        time.sleep(0.001)
"""
"""A program that waits for a time and then counts up in a file, with the lock held, so many times."""


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def identity(**changes):
    found = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "begun": "",
        "what": "a run",
        "time": "2020-01-01T00:00:00+00:00",
    }
    return json.dumps(found | changes)


def test_a_held_folder_is_refused_with_the_holders_name_and_free_afterwards(tmp_path):
    holder = start(HOLDER, tmp_path / "d", 60)
    assert holder.stdout.readline() == "held\n"
    with (
        pytest.raises(
            FolderInUseError,
            match=rf"d is in use by a test \(process {holder.pid} on {socket.gethostname()}, begun \d+ s ago\); wait",
        ),
        exclusive(tmp_path / "d", "another"),
    ):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / "d" / LOCK).exists()
    with exclusive(tmp_path / "d", "another"):
        assert json.loads((tmp_path / "d" / LOCK).read_text())["what"] == "another"
    assert list((tmp_path / "d").iterdir()) == []
    check_free(tmp_path / "d", "a check")
    check_free(tmp_path / "none", "a check")
    assert not (tmp_path / "none").exists()


def test_another_thread_of_the_process_is_refused_and_errors_release(tmp_path):
    found = []

    def other():
        try:
            with exclusive(tmp_path, "two"):
                found.append("held")
        except FolderInUseError as error:
            found.append(str(error))

    def hold_and_fail():
        with exclusive(tmp_path, "one"):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            raise KeyError

    with pytest.raises(KeyError):
        hold_and_fail()
    assert "in use by this very process" in found[0]
    with exclusive(tmp_path, "three"):
        pass


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        identity(pid=2**22 + 1),
        identity(pid=1, begun="another boot 5"),
        identity(),
        identity(pid="x"),
    ],
    ids=["empty", "cut", "list", "no process", "another boot", "this process", "no number"],
)
def test_what_a_dead_process_left_is_taken_over(tmp_path, text):
    (tmp_path / LOCK).write_text(text)
    with exclusive(tmp_path, "new"):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_holder_on_another_host_is_waited_for_and_named_if_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "LEASE_SECONDS", 0.5)
    (tmp_path / LOCK).write_text(identity(host="elsewhere"))
    began = time.monotonic()
    with exclusive(tmp_path, "new"):
        assert time.monotonic() - began > 0.4
    monkeypatch.setattr(locks, "LEASE_SECONDS", 20)
    (tmp_path / LOCK).write_text(identity(host="elsewhere"))
    beat = threading.Timer(0.3, os.utime, [tmp_path / LOCK])
    beat.start()
    with (
        pytest.raises(FolderInUseError, match=r"a run \(process \d+ on elsewhere, begun \d+ s ago\)"),
        exclusive(tmp_path, "new"),
    ):
        pass
    beat.join()
    assert (tmp_path / LOCK).exists()


def test_where_there_are_no_posix_locks_the_file_is_the_lock(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", unsupported)
    with exclusive(tmp_path, "new"):
        holder = identity(pid=os.getppid(), begun=locks.begun(os.getppid()))
        (tmp_path / LOCK).write_text(holder)  # as if the parent had written it at the same time
        monkeypatch.setattr(locks, "_held", set())
        with pytest.raises(FolderInUseError, match="a run"), exclusive(tmp_path, "newer"):
            pass


def test_simultaneous_starts_exclude_each_other(tmp_path):
    (tmp_path / "count").write_text("0")
    at = time.time() + 3
    processes = [start(COUNTER, tmp_path, at, 10) for _ in range(4)]
    assert [process.communicate()[1] for process in processes] == [""] * 4
    assert (tmp_path / "count").read_text() == "40"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="can't be written: Not a directory"), exclusive(tmp_path / "file" / "d", "x"):
        pass
