"""The newest checkpoint of a run, wherever the run keeps them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import orbax.checkpoint as ocp
from etils import epath

from refalign_jax import remote


def checkpoint_folder(run: epath.Path) -> epath.Path:
    """Where a run keeps its checkpoints: what its config.json names as `train.checkpoint_folder`, or `checkpoints`.

    Raises:
      ValueError, OSError: it names an object store that can't be reached.
    """
    try:
        named = json.loads((run / "config.json").read_text())["config"]["train"]["checkpoint_folder"]
    except (OSError, ValueError, LookupError, TypeError):  # there is none, or it is another program's
        named = ""
    if not named or not isinstance(named, str):
        return run / "checkpoints"
    remote.check(named)
    return epath.Path(named if remote.is_remote(named) else Path(os.path.expanduser(named)).absolute())


def newest_checkpoint(folder: epath.Path) -> epath.Path | None:
    """The newest checkpoint in a folder that is whole; None where there is none."""
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []
    places = [folder / str(step) for step in sorted(steps, reverse=True)]
    whole = (place for place in places if not remote.is_remote(place) or ocp.utils.is_checkpoint_finalized(place))
    return next(whole, None)
