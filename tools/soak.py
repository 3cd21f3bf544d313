"""Kills commands at random moments, starts two in one folder, and flips bits, to show that nothing is lost or damaged.

    python tools/soak.py --kills 50
    python tools/soak.py --kills 0 --flips 1000 --starts 200 --command-kills 200

Kills: each training run continues to its last step through as many kills as it meets. Three kills in ten come at any
moment before the process trains; the others come up to a tenth of a second after a step drawn from those that are left,
so that they hit steps and checkpoints being written. Four kills in five are SIGKILL, the fifth is SIGTERM, after which
the process must save and exit with 0. No process of the run may be left after it ends. In the end parameters, moving
average, moments, position in the data and random key must be equal to the bit, and the metrics must show every step
once, with equal losses and norms.

Flips: single bits of a checkpoint, and as many of a dataset, over every file in turn; each must be refused or change
nothing that is read.

Starts: two preparations in one folder at the same moment and, in a fifth of the starts, two trainers; one must run to
its end and the other be refused.

Command kills: prepare, sample, import, export and report in turn are killed by SIGKILL at any moment and started again;
what they wrote must be equal to the byte to what they write undisturbed, with nothing left over.
"""

from refalign_jax.command import run

# isort: split
import dataclasses
import os
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import arg


@dataclasses.dataclass(frozen=True)
class More:
    """What is done beside the kills of training runs."""

    flips: int = 0
    """Single bits to flip in a checkpoint, and as many in a dataset."""
    starts: int = 0
    """Starts of two writers in one folder: preparations and, in a fifth of the starts, trainers."""
    command_kills: int = 0
    """Kills of the other commands together."""


def soak_all(
    *,
    kills: int = 50,
    more: Annotated[More, arg(name="")] = More(),
    steps: int = 40,
    recipe: Path = Path(__file__).parents[1] / "configs/tiny.py",
    seed: int = 0,
    folder: str = "",
) -> int:
    """Kills runs with 0 and with 2 loader workers, and whatever else is asked for; exits 1 if anything was lost.

    Args:
      kills: with each number of workers.
      more: what else.
      steps: of a run that is killed; every third is saved.
      recipe: a small one, for the runs that are killed.
      seed: of the moments, signals and bits.
      folder: where the runs go and, if one fails, stay; removed otherwise. By default a temporary one.
    """
    from refalign_jax.soak.training import soak

    failed = 0
    place = Path(folder or tempfile.mkdtemp()).absolute()
    for workers in (0, 2) if kills else ():
        began = time.monotonic()
        runs, faults = soak(recipe, place, kills, steps, workers, random.Random(seed + workers))
        what = f"{workers} workers: {kills} kills, {runs} runs of {steps} steps"
        failed += _show(what, faults, began)
    if more != More():
        failed += _more(more, place, seed)
    if not failed:
        shutil.rmtree(place)
    return 1 if failed else 0


def _more(more: More, place: Path, seed: int) -> int:
    """Does what is asked for beside the kills of training runs; returns the number of faults."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(place / "cache")  # for the processes to come
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    from refalign_jax.soak.commands import KILLED, PAIRS, kill_command, start_pairs
    from refalign_jax.soak.flips import flip_checkpoint, flip_dataset
    from refalign_jax.soak.inputs import make_inputs

    failed, inputs = 0, make_inputs(place / "inputs")
    for what, flip, where in (("checkpoint", flip_checkpoint, "run"), ("dataset", flip_dataset, "data")):
        if more.flips:
            began = time.monotonic()
            refused, faults = flip(place / "inputs" / where, more.flips, random.Random(seed))
            without = more.flips - refused - len(faults)
            failed += _show(
                f"{more.flips} flips of a {what}: {refused} refused, {without} without effect", faults, began
            )
    for name, share in PAIRS.items():
        if starts := round(share * more.starts):
            began = time.monotonic()
            refused, faults = start_pairs(inputs, name, starts)
            failed += _show(f"{starts} starts of two of {name}: {refused} refused", faults, began)
    for name, share in KILLED.items():
        if kills := round(share * more.command_kills):
            began = time.monotonic()
            results, faults = kill_command(inputs, name, kills, random.Random(seed))
            failed += _show(f"{kills} kills of {name}: {results} results compared", faults, began)
    return failed


def _show(what: str, faults: list[str], began: float) -> int:
    """Prints one line, and the first faults; returns their number."""
    print(f"{what}, {len(faults)} faults, {time.monotonic() - began:.0f} s")
    print("".join(f"{fault}\n" for fault in faults[:20]), end="", flush=True)
    return len(faults)


def main(arguments: list[str], prog: str) -> int:
    """Parses and soaks."""
    return tyro.cli(soak_all, args=arguments, prog=prog, description=__doc__)


if __name__ == "__main__":
    run(main)
