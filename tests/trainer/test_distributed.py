"""How processes find each other, and what they say and do when one is lost, fails or hangs; two real ones each time."""

import re
import signal
import subprocess
import sys
import time

import jax
import pytest
from support.pair import Pair

from refalign_jax.config import TrainConfig
from refalign_jax.trainer import distributed
from refalign_jax.trainer.distributed import VARIABLES, Watch, join

WORK = """
import sys, time
import jax
from jax.experimental import multihost_utils
from refalign_jax.distributed import Watch, join
from refalign_jax.train_config import TrainConfig

config = TrainConfig(lost_after_seconds={lost}, stalled_after_seconds={stalled})
join(config)
with Watch(config) as watch:
    watch.meet("begun")
    for step in range({steps}):
        {trouble}
        multihost_utils.process_allgather(jax.numpy.ones(1))
        watch.step(step + 1)
        print("step", step + 1, flush=True)
        time.sleep(0.05)
"""


def pair(folder, trouble: str = "pass", steps: int = 10_000, lost: float = 3.0, stalled: float = 0.0) -> Pair:
    code = WORK.format(trouble=trouble, steps=steps, lost=lost, stalled=stalled)
    return Pair(folder, "-c", code)


def until_step(two: Pair, step: int) -> None:
    end = time.monotonic() + 100
    while time.monotonic() < end and any(f"step {step}\n" not in output.read_text() for output in two.outputs):
        time.sleep(0.05)


def sentences(two: Pair, process: int) -> list[str]:
    return [line for line in two.outputs[process].read_text().splitlines() if line.startswith("error:")]


def test_processes_that_end_well_end_well(tmp_path):
    two = pair(tmp_path, steps=3)
    assert two.wait() == [0, 0], two.said()
    assert sentences(two, 0) == sentences(two, 1) == []


@pytest.mark.parametrize("silenced", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named_and_the_other_ends(tmp_path, silenced):
    """Killed, or frozen with its machine, it no longer says anything; the other waits for it in a collective."""
    two = pair(tmp_path)
    until_step(two, 2)
    two.processes[1].send_signal(silenced)
    since = time.monotonic()
    assert two.processes[0].wait(60) == distributed.ENDED_BY_WATCH, two.said()
    assert time.monotonic() - since < 30
    (sentence,) = sentences(two, 0)
    assert re.search(r"process 1 on \S+ is lost, having been silent for 3 s after step \d+; so this one ends", sentence)
    two.processes[1].send_signal(signal.SIGCONT)
    assert two.wait()[1] != 0  # thawed, it ends too


def test_without_the_first_process_the_other_ends(tmp_path):
    """By our sentence, or by JAX's page if that is quicker."""
    two = pair(tmp_path)
    until_step(two, 2)
    two.processes[0].kill()
    assert two.processes[1].wait(60) != 0
    said = two.outputs[1].read_text()
    assert "process 0 can't be reached and is lost" in said or "the leader" in said


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_in_one_process_is_told_by_the_other(tmp_path, failing):
    two = pair(tmp_path, f"if step == 2 and jax.process_index() == {failing}: raise ValueError('no such example')")
    codes = two.wait()
    assert (codes[failing], codes[1 - failing]) == (2, distributed.ENDED_BY_WATCH), two.said()
    assert sentences(two, failing) == [f"error: process {failing}: no such example"]
    (sentence,) = sentences(two, 1 - failing)
    assert re.search(rf"process {failing} on \S+ failed after step 2 \(no such example\)", sentence)


def test_a_process_that_hangs_says_where(tmp_path):
    code = """
import time
from refalign_jax.distributed import Watch
from refalign_jax.train_config import TrainConfig

def hang():
    time.sleep(60)

with Watch(TrainConfig(stalled_after_seconds=1.0)) as watch:
    watch.step(7)
    hang()
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert done.returncode == distributed.ENDED_BY_WATCH
    assert "error: no step has finished for 1 s after step 7; the main thread is in hang" in done.stderr
    assert "Current thread" in done.stderr


def test_a_watch_alone_is_left_without_a_trace():
    with pytest.raises(ValueError, match="x"), Watch(TrainConfig()):
        raise ValueError("x")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES must be set too"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "must be numbers"),
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "must be from 0 to 1"),
        ({}, "no cluster is recognised here .*; set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
    ],
)
def test_what_the_environment_lacks_is_said(monkeypatch, values, sentence):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(jax.distributed, "initialize", unrecognised)
    with pytest.raises(ValueError, match=sentence):
        join(TrainConfig())


def unrecognised(**_: object) -> None:
    raise ValueError("coordinator_address should be defined.")
