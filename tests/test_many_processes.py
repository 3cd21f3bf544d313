"""Two processes of four devices beside one of eight: the same run, each other's checkpoints, stopped together."""

import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from pair import TESTS, Pair
from worker import copy, many

from refalign_jax.checkpoint import ARRAYS, find_checkpoint, read_arrays, read_json
from refalign_jax.convert.table import flatten
from refalign_jax.metrics import read_metrics
from refalign_jax.train import train
from tools.soak import _dicts


def saved(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a run's newest checkpoint."""
    path, _ = find_checkpoint(folder)
    return flatten({item: _dicts(read_arrays(path, item)) for item in ARRAYS})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one")
    train(many(folder))
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same run of two processes, which at its end also save again what one process saved."""
    folder = tmp_path_factory.mktemp("two")
    copy = ["--copy", str(one / "checkpoints"), str(folder / "copy/checkpoints")]
    pair = Pair(folder, str(TESTS / "worker.py"), str(folder), *copy)
    assert pair.wait() == [0, 0], pair.said()
    return folder, pair


def same_metrics(a: Path, b: Path) -> None:
    ours, theirs = read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [*range(1, 13)]
    for x, y in zip(ours, theirs, strict=True):
        assert x.keys() == y.keys()
        for name in ("loss", "flow", "pull", "push", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-5), (x["step"], name)


def test_two_processes_train_as_one(one, two):
    folder, pair = two
    same_metrics(folder, one)
    ours, theirs = saved(folder), saved(one)
    assert ours.keys() == theirs.keys()
    for item in ARRAYS:
        names = [name for name in ours if name.startswith(item)]
        a, b = (np.concatenate([np.ravel(arrays[name]) for name in names]) for arrays in (ours, theirs))
        assert tiny.relative(a, b) <= 1e-5, item
    progress = [read_json(find_checkpoint(x)[0], "progress") for x in (folder, one)]
    assert progress[0]["data"] == progress[1]["data"]
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["start"], start["processes"]) == (0, 2)  # written once, by the first
    first, second = (output.read_text() for output in pair.outputs)
    assert "Process 0 of 2, with 4 of 8 devices" in first
    assert "Compiled" in first
    assert "Compiled" not in second  # it says what is wrong, no more


def test_checkpoints_go_from_one_to_two_and_from_two_to_one(one, two, tmp_path):
    folder, _ = two
    copy(many(tmp_path), folder / "checkpoints", tmp_path / "checkpoints")
    for again, first in ((folder / "copy", one), (tmp_path, folder)):
        ours, theirs = saved(again), saved(first)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_both_stop_after_the_same_step_if_one_is_told_to(one, tmp_path):
    pair = Pair(tmp_path, str(TESTS / "worker.py"), str(tmp_path), "--pause", "0.5")
    metrics, until = tmp_path / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and read_metrics(metrics)) and time.monotonic() < until:
        time.sleep(0.05)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [0, 0], pair.said()
    step = int(find_checkpoint(tmp_path)[0].name)
    assert step == len(read_metrics(metrics)) < 12
    assert f"Stopped after step {step}" in pair.said()
    train(many(tmp_path))  # goes on, now as one
    same_metrics(tmp_path, one)
