"""What a run opens before its first step, each part checked as it is opened."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from refalign_jax.config import Config
from refalign_jax.data.loader import BatchIterator
from refalign_jax.data.mixture import Source
from refalign_jax.encoders.interface import VideoCodec
from refalign_jax.initial import random_params
from refalign_jax.locks import exclusive
from refalign_jax.provenance import about
from refalign_jax.sampling import guided_steps
from refalign_jax.sharding import check_batch, check_heads, make_mesh, replicated
from refalign_jax.trainer import preflight
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.optimizer import split
from refalign_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run, opened.

    Attributes:
      config: of the run.
      mesh: the devices.
      source: the examples.
      loader: this process's rows of the training batches.
      empty_text: embedding of the empty prompt, [S, text_width] float32, on every device.
      codec: decodes previews to videos; None where there is none.
      checkpoints: of the run.
      made: what `provenance.about` returned.
    """

    config: Config
    mesh: Mesh
    source: Source
    loader: BatchIterator
    empty_text: Array
    codec: VideoCodec | None
    checkpoints: Checkpoints
    made: Mapping[str, Any]


@contextlib.contextmanager
def open_run(config: Config, source: Source | None = None) -> Iterator[Run]:
    """Opens the run of a recipe, and closes it when the block ends.

    While it is open, the first process holds the locks of its folders, so that a second run in one of them is refused.

    Args:
      config: of the run.
      source: the examples; None opens those that the recipe names.

    Raises:
      ValueError, OSError: what the user can correct, in one sentence.
    """
    mesh = make_mesh(config.mesh)
    check_batch(config.data.batch_size, config.optimizer.accumulation, mesh)
    check_heads(config.model.dit, mesh)
    split(jax.eval_shape(lambda: random_params(config.model, jax.random.key(0))), config.optimizer.freeze)
    if config.train.preview_every:
        guided_steps(config.sampling)  # what is wrong would be found at the first preview
    if source is None:
        source = preflight.open_source(config)
    codec = preflight.preview_codec(config, source)
    empty_text = jax.device_put(preflight.empty_text(config, source), replicated(mesh))
    with contextlib.closing(preflight.open_loader(config, source, "train")) as loader:
        folder = preflight.check_folder(config.train.folder, "train.folder")
        made = about()
        place = config.train.checkpoint_folder or Path(folder) / "checkpoints"
        written = {os.fspath(folder), config.train.checkpoint_folder} - {""} if jax.process_index() == 0 else set()
        with contextlib.ExitStack() as held:
            for locked in sorted(written):
                held.enter_context(exclusive(locked, "a training run"))
            checkpoints = held.enter_context(Checkpoints(place, config.train.keep, config.train.verify_checkpoints))
            yield Run(
                config=config,
                mesh=mesh,
                source=source,
                loader=loader,
                empty_text=empty_text,
                codec=codec,
                checkpoints=checkpoints,
                made=made,
            )
