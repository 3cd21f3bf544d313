"""Kills a training run at random moments, starts it again, and compares it with one that was never stopped.

    python tools/soak.py --kills 50

Each run goes to its last step through as many kills as it meets. A moment lies, three times of ten, anywhere before the
process trains, else up to a tenth of a second after a step drawn from those it has left, so that it falls on steps and
on checkpoints being written. Four kills of five are SIGKILL, the fifth is SIGTERM, after which the process must save
and exit 0. After every end no process of the run may be left. In the end parameters, moving average, moments,
position in the data and the key must be equal to the bit, and the metrics must show every step once, with equal losses
and norms.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

from refalign_jax.command import run

TOOLS = Path(__file__).parent
COMPARED = ("loss", "flow", "pull", "push", "grad_norm", "held_out_loss")


def differences(first: Path, second: Path) -> list[str]:
    """In what the newest checkpoints and the metrics of two runs differ, and steps that are not there just once."""
    import numpy as np

    from refalign_jax.convert.checkpoint import ARRAYS, find_checkpoint, read_arrays, read_json
    from refalign_jax.trainer.log import read_metrics
    from refalign_jax.trees import flatten

    found = []
    a, b = (find_checkpoint(folder)[0] for folder in (first, second))
    for item in ARRAYS:
        ours, theirs = (flatten(_dicts(read_arrays(x, item))) for x in (a, b))
        found += [
            f"{item}/{name}"
            for name in sorted(ours.keys() | theirs.keys())
            if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name])
        ]
    ours, theirs = (read_json(x, "progress") for x in (a, b))
    found += [f"progress/{name}" for name in ours if name != "about" and ours[name] != theirs[name]]
    told, expected = (read_metrics(folder / "metrics.jsonl") for folder in (first, second))
    if [record["step"] for record in told] != [*range(1, len(expected) + 1)]:
        found.append(f"steps {[record['step'] for record in told]}")
    for x, y in zip(told, expected, strict=False):
        found += [f"step {x['step']} {name}" for name in COMPARED if x.get(name) != y.get(name)]
    return found


def _dicts(tree: object) -> dict:
    """Lists of an optimizer's state as dicts."""
    if isinstance(tree, list | tuple):
        tree = {str(i): x for i, x in enumerate(tree)}
    if isinstance(tree, dict):
        return {k: _dicts(v) if isinstance(v, dict | list | tuple) else v for k, v in tree.items() if v is not None}
    return {}


def survivors(session: int, patience: float = 10.0) -> list[int]:
    """Processes of a session that are still there after so many seconds, zombies aside (Linux)."""
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
    """One process of a run."""

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
        """Whether it has got to its steps."""
        return self._starts() > self._before

    def steps(self) -> int:
        """Steps that the metrics tell of."""
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
    """Kills runs so many times.

    Returns:
      How many runs it took, and everything that was not as it must be.
    """
    cache, reference = folder / "cache", folder / f"reference-{workers}"
    for _ in range(2):  # the second finds its programs compiled, as those that follow will
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


def soak_all(
    *,
    kills: int = 50,
    steps: int = 40,
    recipe: Path = TOOLS.parent / "configs/tiny.py",
    seed: int = 0,
    folder: str = "",
) -> int:
    """Kills runs with 0 and with 2 loader workers; exits 1 if anything was lost or left over.

    Args:
      kills: with each number of workers.
      steps: of a run; every third is saved.
      recipe: a small one.
      seed: of the moments and signals.
      folder: where the runs go and, if one fails, stay; removed otherwise. By default a temporary one.
    """
    failed = 0
    place = Path(folder or tempfile.mkdtemp())
    for workers in (0, 2):
        began = time.monotonic()
        runs, faults = soak(recipe, place, kills, steps, workers, random.Random(seed + workers))
        seconds = time.monotonic() - began
        print(f"{workers} workers: {kills} kills, {runs} runs of {steps} steps, {len(faults)} faults, {seconds:.0f} s")
        print("\n".join(faults[:20]), flush=True)
        failed += len(faults)
    if not failed:
        shutil.rmtree(place)
    return 1 if failed else 0


def main(arguments: list[str], prog: str) -> int:
    """Parses and soaks."""
    return tyro.cli(soak_all, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
