"""Kills a training run at random moments, starts it again, and compares it with one that was never stopped.

    python tools/soak.py --kills 50

Each run continues to its last step through as many kills as it meets. Three kills in ten come at any moment before the
process trains; the others come up to a tenth of a second after a step drawn from those that are left, so that they hit
steps and checkpoints being written. Four kills in five are SIGKILL, the fifth is SIGTERM, after which the process must
save and exit with 0. No process of the run may be left after it ends. In the end parameters, moving average, moments,
position in the data and random key must be equal to the bit, and the metrics must show every step once, with equal
losses and norms.

    python tools/soak.py --kills 0 --flips 1000 --starts 20

flips single bits of a checkpoint, over every file in turn: each must be refused or change nothing that is restored. It
also starts two runs in one folder at the same time: one must run to its end and the other be refused.
"""

import dataclasses
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg

from refalign_jax.command import run


@dataclasses.dataclass(frozen=True)
class More:
    """What is done beside the kills."""

    flips: int = 0
    """Single bits to flip, over the files of a checkpoint in turn."""
    starts: int = 0
    """Starts of two runs in one folder."""


def soak_all(
    *,
    kills: int = 50,
    more: Annotated[More, arg(name="")] = More(),
    steps: int = 40,
    recipe: Path = Path(__file__).parents[1] / "configs/tiny.py",
    seed: int = 0,
    folder: str = "",
) -> int:
    """Kills runs with 0 and with 2 loader workers, flips bits, starts pairs; exits 1 if anything was lost or left over.

    Args:
      kills: with each number of workers.
      more: what else.
      steps: of a run; every third is saved.
      recipe: a small one.
      seed: of the moments and signals.
      folder: where the runs go and, if one fails, stay; removed otherwise. By default a temporary one.
    """
    from refalign_jax.trainer.soak import Attempt, flip_bits, soak, start_two

    failed = 0
    place = Path(folder or tempfile.mkdtemp())
    for workers in (0, 2) if kills else ():
        began = time.monotonic()
        runs, faults = soak(recipe, place, kills, steps, workers, random.Random(seed + workers))
        seconds = time.monotonic() - began
        print(f"{workers} workers: {kills} kills, {runs} runs of {steps} steps, {len(faults)} faults, {seconds:.0f} s")
        print("\n".join(faults[:20]), flush=True)
        failed += len(faults)
    if more.starts:
        faults = start_two(recipe, place, more.starts, steps)
        print(f"{more.starts} starts of two runs in one folder, {len(faults)} faults")
        print("\n".join(faults[:20]), flush=True)
        failed += len(faults)
    if more.flips:
        Attempt(recipe, place / "flips", steps, 0, place / "cache").wait()
        refused, faults = flip_bits(place / "flips", more.flips, random.Random(seed))
        print(
            f"{more.flips} flipped bits: {refused} refused, {more.flips - refused - len(faults)} without effect, ",
            end="",
        )
        print(f"{len(faults)} restored as other values")
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
