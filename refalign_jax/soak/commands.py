"""Kills commands at random moments, and starts two of them in one folder, to show that nothing is lost or damaged."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from refalign_jax.convert.checkpoint import load_params
from refalign_jax.data.manifest import MANIFEST
from refalign_jax.digests import CACHE
from refalign_jax.soak.inputs import Inputs, finish
from refalign_jax.soak.processes import Command, context
from refalign_jax.trainer.compare import differences
from refalign_jax.trees import flatten

KILLED = {"prepare": 0.25, "sample": 0.15, "import": 0.25, "export": 0.25, "report": 0.1}
"""Commands that are killed, and the share of the kills of each; those that compute longer get fewer. The trainer has a
soak test of its own, see training.py."""
PAIRS = {"prepare": 0.8, "train": 0.2}
"""Commands of which two are started at once, and the share of the starts of each."""


def kill_command(inputs: Inputs, name: str, kills: int, rng: random.Random) -> tuple[int, list[str]]:
    """Kills a command at random moments, starts it again until it ends, and compares what it wrote.

    Args:
      inputs: of the commands.
      name: one of `KILLED`.
      kills: how many, by SIGKILL.
      rng: draws the moments.

    Returns:
      How many results were compared with that of a command that was never stopped, and what was not as it must be.
    """
    expected, seconds = undisturbed(inputs, name)
    faults: list[str] = []
    done = results = 0
    while done < kills:
        place = inputs.folder / f"killed-{name}-{results}"
        while True:
            command = inputs.run(name, place)
            patience = rng.uniform(0, 1.05 * seconds) if done < kills and rng.random() < 0.8 else None
            if command.wait(patience):
                break
            command.kill()
            done += 1
        results += 1
        output = place.with_name(f"{place.name}.txt")
        there = command.exit_code == 2 and "exists; it is not overwritten" in output.read_text()
        if command.exit_code and not there:  # a kill between the last write and the end leaves a whole result
            faults.append(f"{place}: the last start ended with {command.exit_code}, see {output}")
            continue
        apart = _apart(contents(name, place), expected)
        faults += [f"{place}: {what}" for what in apart]
        if not apart:
            shutil.rmtree(place)
            output.unlink()
    return results, faults


def start_pairs(inputs: Inputs, name: str, starts: int) -> tuple[int, list[str]]:
    """Starts a command twice in one folder at the same moment, several times.

    Args:
      inputs: of the commands.
      name: `prepare` or `train`.
      starts: how many times.

    Returns:
      In how many pairs one was refused because of the other, and what was not as it must be: one runs, and the other is
      refused in a sentence or, if it was too late, finds everything done; the result is that of one alone.
    """
    expected, _ = undisturbed(inputs, name)
    faults: list[str] = []
    refused = 0
    for start in range(starts):
        place = inputs.folder / f"pair-{name}-{start}"
        output = place.with_name(f"{place.name}.txt")
        together = context().Barrier(2)
        pair = [Command(*inputs.command(name, place), output=output, together=together) for _ in range(2)]
        for command in pair:
            command.wait()
        codes = sorted(str(command.exit_code) for command in pair)
        in_use = output.read_text().count(" is in use by ")
        if codes not in (["0", "0"], ["0", "2"]) or in_use != codes.count("2"):
            faults.append(f"{place}: ended with {codes}, see {output}")
            continue
        refused += in_use
        apart = _apart(contents(name, place), expected) if name != "train" else []
        if name == "train":
            apart = [f"{what} differs" for what in differences(place, inputs.folder / f"undisturbed-{name}")]
        faults += [f"{place}: {what}" for what in apart]
        if not apart:
            shutil.rmtree(place)
            output.unlink()
    return refused, faults


def undisturbed(inputs: Inputs, name: str) -> tuple[dict[str, Any], float]:
    """Runs a command without disturbing it; returns what it wrote, and its seconds where its programs are compiled."""
    place = inputs.folder / f"undisturbed-{name}"
    for _ in range(2):
        shutil.rmtree(place, ignore_errors=True)
        seconds = finish(inputs.run(name, place), place.with_name(f"{place.name}.txt"))
    return contents(name, place), seconds


def contents(name: str, place: Path) -> dict[str, Any]:
    """What a command wrote into a folder: the bytes of each file by its name.

    Of a checkpoint it is the bytes of the arrays and the configuration, since Orbax names its files at random; in a
    dataset's manifest and in a page's footer, command and time are left out. The cache of digests is no result.
    """
    files = [path for path in place.rglob("*") if path.is_file() and path.name != CACHE]
    found: dict[str, Any] = {path.relative_to(place).as_posix(): path.read_bytes() for path in files}
    if name == "import":
        params, config = load_params(place / "checkpoint")
        found = {path: value for path, value in found.items() if not path.startswith("checkpoint/")}
        found |= {path: np.asarray(value).tobytes() for path, value in flatten(params).items()}
        found["config"] = config
    for path in [path for path in found if path.endswith(".html")]:
        found[path] = re.sub(rb"<footer>.*?</footer>", b"", found[path], flags=re.DOTALL)
    if MANIFEST in found:
        manifest = json.loads(found[MANIFEST])
        del manifest["sha256"], manifest["made"]["command"], manifest["made"]["time"]
        found[MANIFEST] = manifest
    return found


def _apart(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Sentences on how the contents of two folders differ."""
    both = sorted(found.keys() & expected.keys())
    return [
        *(f"{path} is left over" for path in sorted(found.keys() - expected.keys())),
        *(f"{path} is missing" for path in sorted(expected.keys() - found.keys())),
        *(f"{path} differs" for path in both if found[path] != expected[path]),
    ]
