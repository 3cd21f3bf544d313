"""Kills training runs at random moments, and compares each with a run that was never stopped."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from refalign_jax.command import TOOLS
from refalign_jax.trainer.compare import differences


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
