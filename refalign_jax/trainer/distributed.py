"""Many processes: how they find each other, and how none waits for ever for one that is lost.

JAX finds the others by itself on Cloud TPU VMs, on GKE (xpk), under Slurm and under Open MPI. Anywhere else, three
variables describe the processes to each of them:

    JAX_COORDINATOR_ADDRESS   host:port of process 0, where JAX opens a server
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which one this is, from 0

A collective operation waits without limit for a process that is lost. Three things end that wait:

    A process fails.      It prints its error and exits at once, without waiting for the others (`exit_alone`).
    A process is lost.    JAX's heartbeat notices its silence after `train.lost_after_seconds` and aborts all others
                          (SIGABRT). The page that JAX prints begins with "Terminating process because the JAX
                          distributed service detected fatal errors" and names the lost process by its number: "The
                          following tasks are unhealthy (stopped sending heartbeats): 1". Where process 0 is lost, it
                          says at once that "the leader task was preempted/died". On CPUs the collective may fail
                          first; then the process ends with "a collective operation failed".
    A step hangs.         `HangGuard` prints the stack of every thread and exits.

The next start continues from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import math
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from refalign_jax.atomic import first_line
from refalign_jax.config import TrainConfig

logger = logging.getLogger(__name__)

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS = 300
"""How long a process waits for all others to join."""

STDERR = 2
"""File descriptor of the standard error, which stays when `sys.stderr` is replaced."""

MEET_SECONDS = 86400
"""How long a process waits for all others to have compiled, where `train.stalled_after_seconds` sets no limit."""


def join(config: TrainConfig) -> None:
    """Joins the other processes, before JAX is used otherwise; all but the first log warnings only, with their number.

    Raises:
      ValueError: the variables are incomplete or no numbers, or there are none and no cluster is recognised.
    """
    given = _given()
    sentence = f"error: not all processes have joined within {JOIN_SECONDS} s; see the output of the others."
    timer = threading.Timer(JOIN_SECONDS - 5, _exit, [sentence, 1])  # before JAX ends the process with a page
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=math.ceil(config.lost_after_seconds),
        )
    except ValueError as error:  # no coordinator address, number or index is found
        raise ValueError(
            f"train.distributed is set, but no cluster is recognised here ({error}); set {', '.join(VARIABLES)}."
        ) from error
    finally:
        timer.cancel()
    index, count = jax.process_index(), jax.process_count()
    logger.info("Process %d of %d, with %d of %d devices.", index, count, jax.local_device_count(), jax.device_count())
    if index:
        logging.getLogger("refalign_jax").setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"%(asctime)s process {index}: %(message)s"))


def _given() -> dict[str, Any]:
    """The variables' values, as `jax.distributed.initialize` takes them; empty where none of ours is set."""
    address, *numbers = (os.environ.get(name, "") for name in VARIABLES)
    if not any(numbers):
        return {}
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(f"{' and '.join(missing)} must be set too, since another of {', '.join(VARIABLES)} is.")
    try:
        count, index = map(int, numbers)
    except ValueError as error:
        raise ValueError(
            f"JAX_NUM_PROCESSES={numbers[0]!r} and JAX_PROCESS_ID={numbers[1]!r} must be numbers."
        ) from error
    if not 0 <= index < count:
        raise ValueError(f"JAX_PROCESS_ID={index} must be from 0 to {count - 1}, since JAX_NUM_PROCESSES={count}.")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def meet(name: str, config: TrainConfig) -> None:
    """Waits until every process has come here; each name serves for one meeting.

    The first collective operation would wait too, but not for long: on CPUs it fails after 30 s.
    """
    seconds = config.stalled_after_seconds or MEET_SECONDS
    ocp.multihost.get_barrier_sync_fn()(key=f"refalign_jax/{name}", timeout_ms=int(1000 * seconds))


@contextlib.contextmanager
def exit_alone() -> Iterator[None]:
    """Where there are several processes, an exception that leaves the block is printed and ends this one at once.

    Otherwise it would wait for the others when Python exits, while they wait for it in a collective operation. The exit
    code is 2 for an error of the user, which is printed in one sentence, and 1 for any other.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        name = f"error: process {jax.process_index()}:"
        if "Gloo" in str(error):  # the collective operations of CPUs; JAX raises it as a ValueError
            _exit(f"{name} a collective operation failed, since another process is lost ({first_line(error)}).", 1)
        if isinstance(error, ValueError | OSError):
            _exit(f"{name} {error}", 2)
        traceback.print_exception(error)
        _exit(f"{name} {first_line(error)}.", 1)


class HangGuard:
    """Ends this process if no step finishes for `seconds`, with the stack of every thread; a context manager.

    Python's faulthandler prints "Timeout", then the stacks, and exits with code 1, whatever the threads wait for. One
    second before, a sentence names the last step.

    Args:
      seconds: `train.stalled_after_seconds`; 0 sets no limit.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer = threading.Timer(0, lambda: None)

    def step(self, done: int) -> None:
        """To be called after every step, with the number of steps done."""
        self._timer.cancel()
        if not self._seconds:
            return
        sentence = (
            f"error: no step has finished for {self._seconds:g} s after step {done}; the stacks of all threads follow. "
            "The next start continues from the newest checkpoint."
        )
        self._timer = threading.Timer(self._seconds, print, [sentence], {"file": sys.stderr, "flush": True})
        self._timer.daemon = True
        self._timer.start()
        faulthandler.dump_traceback_later(self._seconds + 1, exit=True, file=STDERR)

    def __enter__(self) -> HangGuard:
        self.step(0)
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _exit(sentence: str, code: int) -> None:
    """Prints a sentence and ends the process, whatever its threads wait for."""
    print(sentence, file=sys.stderr, flush=True)
    os._exit(code)
