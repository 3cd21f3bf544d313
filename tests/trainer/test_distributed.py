"""How processes find each other, and how they end when one is lost, fails or hangs; two real processes each time."""

import signal
import subprocess
import sys
import time

import jax
import pytest
from support.pair import Pair
from support.places import environment

from refalign_jax.config import TrainConfig
from refalign_jax.trainer.distributed import VARIABLES, HangGuard, exit_alone, join

WORK = """
import sys, time
import jax
from jax.experimental import multihost_utils
from refalign_jax.config import TrainConfig
from refalign_jax.trainer.distributed import HangGuard, exit_alone, join, meet

config = TrainConfig(lost_after_seconds={lost}, stalled_after_seconds={stalled})
with exit_alone():
    join(config)
    with HangGuard(config.stalled_after_seconds) as guard:
        meet("begun", config)
        for step in range({steps}):
            {trouble}
            multihost_utils.process_allgather(jax.numpy.ones(1))
            guard.step(step + 1)
            print("step", step + 1, flush=True)
            time.sleep(0.05)
"""
FAILED_COLLECTIVE = "a collective operation failed, since another process is lost"
ABORTED = "Terminating process because the JAX distributed service detected fatal errors"


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
def test_when_a_process_is_lost_the_other_ends(tmp_path, silenced):
    """Killed, its connections break; frozen with its machine, nothing but its silence shows that it is lost."""
    two = pair(tmp_path)
    until_step(two, 2)
    two.processes[1].send_signal(silenced)
    since = time.monotonic()
    code = two.processes[0].wait(60)
    assert time.monotonic() - since < 30
    output = two.outputs[0].read_text()
    if silenced == signal.SIGSTOP:
        assert code == -signal.SIGABRT, output
        assert ABORTED in output
        assert "The following tasks are unhealthy (stopped sending heartbeats):\n1\n" in output
    else:
        assert code != 0
        assert FAILED_COLLECTIVE in output or ABORTED in output
    two.processes[1].send_signal(signal.SIGCONT)
    assert two.wait()[1] != 0  # thawed, it ends too


def test_without_the_first_process_the_other_ends(tmp_path):
    two = pair(tmp_path)
    until_step(two, 2)
    two.processes[0].kill()
    assert two.processes[1].wait(60) != 0
    output = two.outputs[1].read_text()
    assert FAILED_COLLECTIVE in output or ABORTED in output


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failing_process_ends_in_a_sentence_and_so_does_the_other(tmp_path, failing):
    two = pair(tmp_path, f"if step == 2 and jax.process_index() == {failing}: raise ValueError('no such example')")
    codes = two.wait(100)
    assert codes[failing] == 2, two.said()
    assert codes[1 - failing] != 0
    assert sentences(two, failing) == [f"error: process {failing}: no such example"]
    output = two.outputs[1 - failing].read_text()
    assert FAILED_COLLECTIVE in output or ABORTED in output


def test_a_process_that_hangs_prints_where(tmp_path):
    code = """
import time
from refalign_jax.trainer.distributed import HangGuard

def hang():
    time.sleep(60)

with HangGuard(1.0) as guard:
    guard.step(7)
    hang()
"""
    command, variables = [sys.executable, "-c", code], environment()
    done = subprocess.run(command, env=variables, stderr=subprocess.PIPE, text=True, check=False, timeout=100)
    assert done.returncode == 1
    sentence, *stacks = done.stderr.splitlines()
    assert sentence.startswith("error: no step has finished for 1 s after step 7; the stacks of all threads follow.")
    assert any(line.endswith("in hang") for line in stacks)


def test_a_process_alone_raises_its_error():
    with pytest.raises(ValueError, match="x"), exit_alone(), HangGuard(100):
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
