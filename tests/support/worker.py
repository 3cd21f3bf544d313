"""One of several processes of the runs in test_many_processes.py; not a test."""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np

from refalign_jax.command import log_progress
from refalign_jax.config import Config
from refalign_jax.sharding import make_mesh
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.loop import train
from refalign_jax.trainer.preflight import open_source
from refalign_jax.trainer.preview import draw_preview, preview_rows
from refalign_jax.trainer.state import begin, save
from support.runs import recipe
from support.sources import Slow


def many(folder: Path) -> Config:
    """The small recipe, without previews and held-out losses, whose programs would have to be compiled too."""
    return recipe(folder, preview_every=0, held_out_every=0)


def copy(config: Config, source: Path, target: Path) -> None:
    """Restores the newest of the checkpoints in a folder, saves it in another, and a preview of it beside that."""
    mesh = make_mesh(config.mesh)
    with Checkpoints(source, 1) as checkpoints:
        state, position = begin(config, mesh, checkpoints)
    with Checkpoints(target, 1) as checkpoints:
        save(state, position or {}, config, {}, checkpoints)
    rows, empty = preview_rows(config, open_source(config)), np.zeros((5, 16), np.float32)
    drawn = draw_preview(state.params, rows, empty, config, mesh)
    if jax.process_index() == 0:
        np.save(target.parent / "preview.npy", drawn.latents)


def main() -> None:
    """Trains; then, if asked, restores another run's checkpoint and saves it again."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds that every example takes to read")
    parser.add_argument("--copy", type=Path, nargs=2, default=None, help="folders of checkpoints, from and to")
    arguments = parser.parse_args()
    log_progress()
    config = many(arguments.folder)
    joined = dataclasses.replace(config.train, distributed=True)
    train(dataclasses.replace(config, train=joined), Slow(config, arguments.pause))
    if arguments.copy:
        copy(config, *arguments.copy)


if __name__ == "__main__":
    main()
