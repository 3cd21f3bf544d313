"""Two processes of four devices beside one of eight: the same run, each other's checkpoints, stopped together."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from support import tiny
from support.pair import Pair
from support.places import WORKER
from support.worker import copy, many

from refalign_jax.config import ExportConfig
from refalign_jax.convert.checkpoint import ARRAYS, find_checkpoint, load_params, read_arrays, read_json
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.files import open_weights
from refalign_jax.convert.table import to_ours
from refalign_jax.convert.transfer import export_weights
from refalign_jax.trainer.compare import plain_dicts
from refalign_jax.trainer.log import read_metrics
from refalign_jax.trainer.loop import train
from refalign_jax.trees import flatten

pytestmark = pytest.mark.slow


def saved(folder: Path) -> dict[str, np.ndarray]:
    """All arrays of a run's newest checkpoint."""
    path, _ = find_checkpoint(folder)
    return flatten({item: plain_dicts(read_arrays(path, item)) for item in ARRAYS})


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one")
    train(many(folder))
    return folder


@pytest.fixture(scope="module")
def two(one, tmp_path_factory):
    """The same run of two processes, one of which is told to stop on the way.

    At their end they also save again what one process saved.
    """
    folder = tmp_path_factory.mktemp("two")
    copied = ["--copy", str(one / "checkpoints"), str(folder / "copy/checkpoints")]
    pair = Pair(folder, str(WORKER), str(folder), "--pause", "0.25", *copied)
    metrics, until = folder / "metrics.jsonl", time.monotonic() + 500
    while not (metrics.exists() and read_metrics(metrics)) and time.monotonic() < until:
        time.sleep(0.05)
    pair.processes[1].send_signal(signal.SIGTERM)
    assert pair.wait() == [0, 0], pair.said()
    return folder, pair


def steps(a: Path, b: Path) -> list[int]:
    """The steps that the first of two runs did, after comparing them with the second's."""
    ours, theirs = read_metrics(a / "metrics.jsonl"), read_metrics(b / "metrics.jsonl")
    for x, y in zip(ours, theirs, strict=False):
        assert x.keys() == y.keys()
        for name in ("loss", "flow", "pull", "push", "grad_norm"):
            assert x[name] == pytest.approx(y[name], rel=1e-5), (x["step"], name)
    return [record["step"] for record in ours]


def test_both_stop_after_the_same_step_if_one_is_told_to(one, two):
    folder, pair = two
    step = int(find_checkpoint(folder)[0].name)
    assert steps(folder, one) == [*range(1, step + 1)]  # so far as one process would have
    assert step < 12
    first, second = (output.read_text() for output in pair.outputs)
    assert "Process 0 of 2, with 4 of 8 devices" in first
    assert f"Stopped after step {step}" in first
    assert "Compiled" in first
    assert "Compiled" not in second  # it says what is wrong, no more
    start = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert (start["start"], start["processes"]) == (0, 2)  # written once, by the first


def test_checkpoints_go_from_one_to_two_and_from_two_to_one(one, two, tmp_path):
    folder, _ = two
    copy(many(tmp_path), folder / "checkpoints", tmp_path / "checkpoints")
    for again, first in ((folder / "copy", one), (tmp_path, folder)):
        ours, theirs = saved(again), saved(first)
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_previews_of_two_processes_are_those_of_one(one, two, tmp_path):
    copy(many(tmp_path), one / "checkpoints", tmp_path / "checkpoints")
    alone, joined = (np.load(folder / "preview.npy") for folder in (tmp_path, two[0] / "copy"))
    assert alone.shape == (2, *tiny.GRID, 16)
    assert tiny.relative(joined, alone) <= 1e-5


def test_what_several_processes_saved_is_exported(two, tmp_path):
    params, model = load_params(two[0])
    export_weights(two[0], tmp_path / "out.safetensors", ExportConfig(projectors=True))
    table = model_table(model.dit, model.alignment)
    written = flatten(to_ours(table, params, open_weights(tmp_path / "out.safetensors")))
    for name, value in flatten(params).items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def test_one_process_ends_what_two_began_as_it_would_have_alone(one, two, tmp_path):
    shutil.copytree(two[0], tmp_path, dirs_exist_ok=True)
    train(many(tmp_path))
    assert steps(tmp_path, one) == [*range(1, 13)]
    ours, theirs = saved(tmp_path), saved(one)
    assert ours.keys() == theirs.keys()
    for item in ARRAYS:
        names = [name for name in ours if name.startswith(item)]
        a, b = (np.concatenate([np.ravel(arrays[name]) for name in names]) for arrays in (ours, theirs))
        assert tiny.relative(a, b) <= 1e-5, item
    progress = [read_json(find_checkpoint(folder)[0], "progress") for folder in (tmp_path, one)]
    assert progress[0]["data"] == progress[1]["data"]
