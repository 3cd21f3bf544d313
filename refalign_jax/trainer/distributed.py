"""Many processes: how they find each other, and how none waits for ever for one that is gone.

JAX finds the others by itself on Cloud TPU VMs, on GKE (xpk), under Slurm and under Open MPI. Anywhere else, three
variables tell each process of them:

    JAX_COORDINATOR_ADDRESS   host:port of process 0, where JAX opens a server
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which one this is, from 0

A collective waits for a process that is gone, or hangs, as long as it takes. So every process tells the others that it
lives, through the server that JAX has in process 0, and listens. What it finds wrong it says in one sentence, and ends.
JAX has a watch of its own, which ends a process with a page of text and without naming the other's host or step; it
is given more time and stays behind as a reserve.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
import traceback
from types import FrameType
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed  # its client of the server in process 0 has no public name

from refalign_jax.config import TrainConfig

logger = logging.getLogger(__name__)

VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_SECONDS = 300
"""How long a process waits for all of the others to come."""

ENDED_BY_WATCH = 3
"""Exit code of a process that ends because of another, or because it hangs."""

_PLACE = "refalign_jax/processes"
_GOES_ON = "The next start goes on from the newest checkpoint."


def join(config: TrainConfig) -> None:
    """Joins the other processes, before JAX is used otherwise; all but the first log warnings only, with their number.

    Raises:
      ValueError: the variables are incomplete or no numbers, or there are none and no cluster is recognised.
    """
    given = _given()
    timer = threading.Timer(JOIN_SECONDS - 5, _end, ["", f"Not all processes have come within {JOIN_SECONDS} s."])
    timer.daemon = True
    timer.start()
    reserve = int(1.5 * config.lost_after_seconds) + 5
    try:
        jax.distributed.initialize(**given, initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=reserve)
    except ValueError as error:  # of a coordinator address, number or index that is nowhere to be found
        raise ValueError(
            f"train.distributed is set, but no cluster is recognised here ({error}); set {', '.join(VARIABLES)}."
        ) from error
    finally:
        timer.cancel()
    index, count = jax.process_index(), jax.process_count()
    logger.info("Process %d of %d, with %d of %d devices.", index, count, jax.local_device_count(), jax.device_count())
    if index:
        logging.getLogger().setLevel(logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(logging.Formatter(f"%(asctime)s process {index}: %(message)s"))


def _given() -> dict[str, Any]:
    """What the variables tell, as `jax.distributed.initialize` takes it; empty where none of ours is set."""
    address, *numbers = (os.environ.get(name, "") for name in VARIABLES)
    if not any(numbers):
        return {}
    lacking = [name for name in VARIABLES if not os.environ.get(name)]
    if lacking:
        raise ValueError(f"{' and '.join(lacking)} must be set too, since another of {', '.join(VARIABLES)} is.")
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


class Watch:
    """Ends this process, with a sentence, when another is lost or when no step finishes; a context manager.

    A process that leaves it by an exception tells the others and ends at once where there are others: they wait for it
    in a collective, and Python's exit would wait for them.

    Args:
      config: has `lost_after_seconds` and `stalled_after_seconds`.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._index, self._count = jax.process_index(), jax.process_count()
        self._client = jax_distributed.global_state.client if self._count > 1 else None
        times = [t for t in (config.lost_after_seconds, config.stalled_after_seconds) if t]
        self._interval = min(max(min(times, default=50.0) / 10, 0.1), 5.0)
        self._main = threading.get_ident()
        self._done, self._since, self._beats = 0, time.monotonic(), 0
        self._heard: dict[int, tuple[int, float, dict[str, Any]]] = {
            i: (-1, time.monotonic(), {"host": "?", "step": 0}) for i in range(self._count) if i != self._index
        }
        self._left = threading.Event()
        self._threads = [threading.Thread(target=self._keep_watch, daemon=True)]
        if self._index:
            self._threads.append(threading.Thread(target=self._listen_to_the_first, daemon=True))

    def step(self, done: int) -> None:
        """To be called after every step, with the steps done, and between other long things."""
        self._done, self._since = done, time.monotonic()

    def meet(self, place: str) -> None:
        """Waits until every process is at the same place; each place is one meeting.

        Collectives wait for the last process too, but not for long: on CPUs 30 s for the first contact.
        """
        if self._client is not None:
            self._client.wait_at_barrier(f"{_PLACE}/{place}", int(1000 * (self._config.stalled_after_seconds or 86400)))

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: object) -> None:
        if self._client is not None and isinstance(error, jax.errors.JaxRuntimeError):
            # A collective may fail because of another process: leave it to the watch to find out which.
            time.sleep(self._config.lost_after_seconds + 2 * self._interval)
        self._left.set()
        if self._client is None:
            return
        if error is None:
            self._tell("done")
            self._client.key_value_set(f"{_PLACE}/left/{self._index}", "")
            for thread in self._threads:
                thread.join()
            return
        mendable = isinstance(error, ValueError | OSError)
        if mendable:
            print(f"error: process {self._index}: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(error)
        self._tell((str(error).splitlines() or [type(error).__name__])[0])
        if not self._index:  # what it told is lost with it
            time.sleep(2 * self._interval)
        os._exit(2 if mendable else 1)

    def _keep_watch(self) -> None:
        """Tells and listens until the end, or ends the process."""
        while not self._left.wait(self._interval):
            stalled = self._config.stalled_after_seconds
            if stalled and time.monotonic() - self._since > stalled:
                self._end_stalled()
            if self._client is None:
                continue
            try:
                self._tell("")
                told = self._client.key_value_dir_get(f"{_PLACE}/alive")
            except jax.errors.JaxRuntimeError:
                self._end_without_the_first()
            for name, value in told:
                self._hear(int(name.rpartition("/")[2]), json.loads(value))
            for index, (_, when, last) in self._heard.items():
                if time.monotonic() - when > self._config.lost_after_seconds and last.get("ended") != "done":
                    _end(
                        self._name(),
                        f"process {index} on {last['host']} is lost, having been silent for "
                        f"{self._config.lost_after_seconds:g} s after step {last['step']}; so this one ends after step "
                        f"{self._done}.",
                    )

    def _tell(self, ended: str) -> None:
        """Tells the others that this process lives, or how it ended."""
        self._beats += 1
        state = {"beat": self._beats, "host": socket.gethostname(), "step": self._done, "ended": ended}
        assert self._client is not None
        self._client.key_value_set(f"{_PLACE}/alive/{self._index}", json.dumps(state), allow_overwrite=True)

    def _hear(self, index: int, state: dict[str, Any]) -> None:
        """Notes what another process told; ends this one if it failed."""
        if index == self._index or state["beat"] == self._heard[index][0]:
            return
        self._heard[index] = state["beat"], time.monotonic(), state
        if state["ended"] not in ("", "done"):
            what = f"process {index} on {state['host']} failed after step {state['step']} ({state['ended']:.300})"
            _end(self._name(), f"{what}; so this one ends after step {self._done}.")

    def _listen_to_the_first(self) -> None:
        """Waits for what comes only when this process leaves; so, if process 0 is gone, that is known at once."""
        while not self._left.is_set():
            try:
                self._client.blocking_key_value_get(f"{_PLACE}/left/{self._index}", 60_000)  # type: ignore[union-attr]
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._end_without_the_first()

    def _end_without_the_first(self) -> None:
        if self._left.is_set():
            return
        _end(self._name(), f"process 0 can't be reached and is lost; so this one ends after step {self._done}.")

    def _end_stalled(self) -> NoReturn:
        frame = sys._current_frames().get(self._main)
        faulthandler.dump_traceback(all_threads=True)
        if not self._index and self._count > 1:  # the server is here; the others' word may be the one that counts
            time.sleep(2 * self._interval)
        _end(
            self._name(),
            f"no step has finished for {self._config.stalled_after_seconds:g} s after step {self._done}; the main "
            f"thread is in {_where(frame)}, the stacks are above.",
        )

    def _name(self) -> str:
        return f"Process {self._index} on {socket.gethostname()}: " if self._count > 1 else ""


def _where(frame: FrameType | None) -> str:
    """The innermost function of this package in which a thread is, and the innermost of all."""
    stack = [f"{f.name} ({os.path.basename(f.filename)}:{f.lineno})" for f in traceback.extract_stack(frame)]
    ours = [entry.name for entry in traceback.extract_stack(frame) if "refalign_jax" in entry.filename]
    return f"{stack[-1]}, called from {ours[-1]}" if ours and stack else (stack or ["no Python function"])[-1]


def _end(who: str, sentence: str) -> NoReturn:
    """Prints a sentence and ends the process, whatever its threads wait for."""
    print(f"error: {who}{sentence} {_GOES_ON}", file=sys.stderr, flush=True)
    os._exit(ENDED_BY_WATCH)
