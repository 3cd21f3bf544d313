"""Kills training runs, starts two in one folder and flips bits of checkpoints, to show that nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from refalign_jax.command import TOOLS
from refalign_jax.config import Config
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.compare import differences
from refalign_jax.trainer.state import array_items, state_shapes


def survivors(session: int, patience: float = 10.0) -> list[int]:
    """Processes of a session that are still alive after so many seconds, zombies aside (Linux)."""
    until = time.monotonic() + patience
    while True:
        left = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, *rest = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if state != "Z" and int(rest[2]) == session:
                left.append(int(path.parent.name))
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.1)


class Attempt:
    """One process of a run.

    Args:
      recipe: of the run.
      folder: of the run; output.txt in it receives what the process prints.
      steps: of the run.
      workers: of the loader.
      cache: folder of compiled programs.
    """

    def __init__(self, recipe: Path, folder: Path, steps: int, workers: int, cache: Path) -> None:
        self.metrics = folder / "metrics.jsonl"
        self._before = self._starts()
        command = [sys.executable, str(TOOLS / "train.py"), str(recipe)]
        for field, value in (
            ("train.folder", folder),
            ("train.compilation-cache", cache),
            ("train.steps", steps),
            ("train.save-every", 3),
            ("train.preview-every", 0),
            ("data.num-workers", workers),
        ):
            command += [f"--{field}", str(value)]
        environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        self.started = time.monotonic()

    def _starts(self) -> int:
        return self.metrics.read_text().count('{"start"') if self.metrics.exists() else 0

    def training(self) -> bool:
        """Whether it has started its steps."""
        return self._starts() > self._before

    def steps(self) -> int:
        """Number of steps in the metrics."""
        return self.metrics.read_text().count('{"step"') if self.metrics.exists() else 0

    def wait_for_step(self, step: int) -> float:
        """Seconds until it trains and has done so many steps, or until it ended."""
        while self.process.poll() is None and not (self.training() and self.steps() >= step):
            time.sleep(0.002)
        return time.monotonic() - self.started

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it ended by itself in so many seconds."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True


def soak(recipe: Path, folder: Path, kills: int, steps: int, workers: int, rng: random.Random) -> tuple[int, list[str]]:
    """Kills runs at random moments and starts them again, and compares each with a run that was never stopped.

    Args:
      recipe: a small one.
      folder: of the runs; those with faults stay.
      kills: how many.
      steps: of each run; every third is saved.
      workers: of the loader.
      rng: draws moments and signals.

    Returns:
      How many runs it took, and everything that was not as it must be, as sentences.
    """
    cache, reference = folder / "cache", folder / f"reference-{workers}"
    for _ in range(2):  # the second run finds its programs compiled, as those that follow do
        shutil.rmtree(reference, ignore_errors=True)
        first = Attempt(recipe, reference, steps, workers, cache)
        ready = first.wait_for_step(0)
        first.wait()
        if first.process.returncode:
            return 0, [f"the run that nobody stops ended with {first.process.returncode}, see {reference}/output.txt"]
    faults, done, runs = [], 0, 0
    while done < kills:
        runs += 1
        place = folder / f"run-{workers}-{runs}"
        while True:
            attempt = Attempt(recipe, place, steps, workers, cache)
            if rng.random() < 0.3:
                ended = attempt.wait(rng.uniform(0, ready))
            else:
                attempt.wait_for_step(rng.randint(attempt.steps(), steps))
                ended = attempt.wait(rng.uniform(0, 0.1))
            signal_ = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            if not ended and done < kills:
                done += 1
                training = attempt.training()
                attempt.process.send_signal(signal_)
            attempt.wait()
            left = survivors(attempt.process.pid)
            if left:
                faults.append(f"{place.name}: processes {left} outlived it")
            code = attempt.process.returncode
            if code == 0 and (place / "checkpoints" / str(steps)).is_dir():
                break
            allowed = {-signal.SIGKILL} if signal_ == signal.SIGKILL else {0} if training else {0, -signal.SIGTERM}
            if ended or code not in allowed:
                faults.append(f"{place.name}: ended with {code} after {signal_.name}, see its output.txt")
                break
        faults += [f"{place.name}: {difference} differs" for difference in differences(place, reference)]
        if not faults:
            shutil.rmtree(place)
    return runs, faults


def start_two(recipe: Path, folder: Path, starts: int, steps: int) -> list[str]:
    """Starts two runs in one folder at the same time, several times.

    Args:
      recipe: a small one.
      folder: of the runs; those with faults stay.
      starts: how many times.
      steps: of each run.

    Returns:
      Everything that was not as it must be: exactly one runs, and the other is refused in a sentence.
    """
    cache, faults = folder / "cache", []
    for start in range(starts):
        place = folder / f"two-{start}"
        pair = [Attempt(recipe, place, steps, 0, cache) for _ in range(2)]
        for attempt in pair:
            attempt.wait()
        codes = sorted(attempt.process.returncode for attempt in pair)
        output = (place / "output.txt").read_text()
        done = (place / "checkpoints" / str(steps)).is_dir() and pair[0].steps() == steps
        if codes != [0, 2] or output.count(" is in use by ") != 1 or not done:
            faults.append(f"{place.name}: ended with {codes}, see its output.txt")
        else:
            shutil.rmtree(place)
    return faults


def flip_bits(run: Path, flips: int, rng: random.Random) -> tuple[int, list[str]]:
    """Flips bits of the newest checkpoint of a run, one at a time, and restores it; the files take turns.

    Args:
      run: a folder; its files are what they were when this returns.
      flips: how many.
      rng: draws the bits.

    Returns:
      How many flips were refused, and the others that changed what was restored.
    """
    checkpoint = Path(find_checkpoint(run)[0])
    names = sorted(path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    refused, faults, expected = 0, [], _restored(checkpoint)
    for name in (names[index % len(names)] for index in range(flips)):
        path = checkpoint / name
        before = path.read_bytes()
        bit = rng.randrange(8 * len(before))
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            if _restored(checkpoint) != expected:
                faults.append(f"bit {bit} of {name} was flipped, and the checkpoint restored")
        except ValueError as error:
            refused += 1
            if "\n" in str(error):
                faults.append(f"bit {bit} of {name} was refused in more than one line")
        finally:
            path.write_bytes(before)
    return refused, faults


def _restored(checkpoint: Path) -> list[object]:
    """Everything that a run reads from a checkpoint, for comparison to the bit."""
    step = int(checkpoint.name)
    with Checkpoints(checkpoint.parent, 2**31) as checkpoints:
        values = checkpoints.read_config(step)
        config = from_dict(Config, values, os.fspath(checkpoint))
        shapes = array_items(state_shapes(config, make_mesh(config.mesh)))
        arrays, progress = checkpoints.restore(step, shapes)
    return [values, progress, [np.asarray(x).tobytes() for x in jax.tree.leaves(arrays)]]
