"""Losses on examples that training never sees."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from refalign_jax.config import Config
from refalign_jax.data.loader import Source
from refalign_jax.objective import Batch, objective
from refalign_jax.sharding import to_devices
from refalign_jax.trainer.preflight import open_loader
from refalign_jax.trainer.step import as_batch, mean_terms
from refalign_jax.types import Array, Int, Params


@functools.partial(jax.jit, static_argnames="config")
def held_out_terms(params: Params, batch: Batch, place: Int[Array, " B"], config: Config) -> dict[str, Array]:
    """Batch means of the loss's terms, at noise and times that are fixed for each example.

    Args:
      params: of the model.
      batch: held-out examples, nothing dropped.
      place: index of each among the held-out examples; over all of them, times cover the schedule evenly.
      config: of the run.
    """
    key, shape = jax.random.key(config.train.seed), batch.video_latents.shape[1:]
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(place)
    index = ((place + 0.5) * (config.model.flow.num_train_steps / config.data.held_out)).astype(jnp.int32)
    _, terms = objective(params, batch, noise, index, jnp.int32(0), config.model)
    return mean_terms(terms, batch)


def held_out_batches(config: Config, source: Source, mesh: Mesh) -> Iterator[tuple[Batch, Int[Array, " B"]]]:
    """One pass over the held-out examples: batches, and the index of each row among the held-out examples."""
    data = dataclasses.replace(config.data, num_workers=0)
    with contextlib.closing(open_loader(data, source, "held_out")) as loader:
        for _ in range(data.held_out // data.batch_size):
            rows = next(loader)
            place = (rows["index"] - (len(source) - data.held_out)).astype(np.int32)
            yield as_batch(rows, mesh), to_devices(place, mesh)


def held_out_losses(params: Params, config: Config, source: Source, mesh: Mesh) -> dict[str, float]:
    """Means of the loss's terms over the held-out examples, named held_out_loss, held_out_flow and so on."""
    with jax.set_mesh(mesh):
        means = [held_out_terms(params, *inputs, config) for inputs in held_out_batches(config, source, mesh)]
    names = ("loss", "flow", "pull", "push")
    return {f"held_out_{name}": float(np.mean([jax.device_get(mean[name]) for mean in means])) for name in names}
