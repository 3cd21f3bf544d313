"""Flips single bits of checkpoints and datasets, to show that no damage is read without a word."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from refalign_jax.config import Config
from refalign_jax.config.recipe import from_dict
from refalign_jax.convert.checkpoint import find_checkpoint
from refalign_jax.data.shards import ShardSource, verify_shards
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.state import array_items, state_shapes


def flip_checkpoint(run: Path, flips: int, rng: random.Random) -> tuple[int, list[str]]:
    """Flips bits of the newest checkpoint of a run, one at a time, and restores it as training does.

    Args:
      run: a folder; its files are what they were when this returns.
      flips: how many; the files take turns.
      rng: draws the bits.

    Returns:
      How many flips were refused, and the others that changed what was restored.
    """
    checkpoint = Path(find_checkpoint(run)[0])
    step = int(checkpoint.name)
    with Checkpoints(checkpoint.parent, 2**31) as checkpoints:
        config = from_dict(Config, checkpoints.read_config(step), os.fspath(checkpoint))
        shapes = array_items(state_shapes(config, make_mesh(config.mesh)))

        def restored(_: Path | None) -> list[object]:
            values = checkpoints.read_config(step)
            arrays, progress = checkpoints.restore(step, shapes)
            return [values, progress, [np.asarray(x).tobytes() for x in jax.tree.leaves(arrays)]]

        return _flip(_files(checkpoint), flips, rng, restored)


def flip_dataset(folder: Path, flips: int, rng: random.Random) -> tuple[int, list[str]]:
    """Flips bits of a prepared dataset, one at a time, and reads it as training does; also verifies its checksums.

    Args:
      folder: of the dataset; its files are what they were when this returns. Hidden ones are left alone.
      flips: how many; the files take turns.
      rng: draws the bits.

    Returns:
      How many flips were refused, and the others that changed what was read, or that the checksums did not show.
    """

    def read(path: Path | None) -> object:
        if path is not None and path.suffix == ".array_record" and not verify_shards(folder):
            return "its checksum did not change"
        return _examples(folder)

    return _flip([path for path in _files(folder) if not path.name.startswith(".")], flips, rng, read)


def _flip(
    files: Sequence[Path], flips: int, rng: random.Random, read: Callable[[Path | None], object]
) -> tuple[int, list[str]]:
    """Flips bits of files in turn; `read` gets the file and raises ValueError or OSError, or returns what it read."""
    refused, faults, expected = 0, [], read(None)
    for path in (files[index % len(files)] for index in range(flips)):
        before = path.read_bytes()
        bit = rng.randrange(8 * len(before))
        flipped = bytearray(before)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            if read(path) != expected:
                faults.append(f"bit {bit} of {path} was flipped, and it was read")
        except (ValueError, OSError) as error:
            refused += 1
            if "\n" in str(error):
                faults.append(f"bit {bit} of {path} was refused in more than one line")
        finally:
            path.write_bytes(before)
    return refused, faults


def _files(folder: Path) -> list[Path]:
    """All files below a folder that are not empty, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def _examples(folder: Path) -> list[object]:
    """Everything that training reads from a dataset, for comparison to the bit."""
    source = ShardSource(folder)
    found: list[Any] = [source.spec, dict(source.manifest.made), source.identity(len(source))]
    for index in range(len(source)):
        arrays, about = source[index]
        found.append([about, {name: (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}])
    return found
