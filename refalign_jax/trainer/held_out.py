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
from refalign_jax.trainer.step import as_batch
from refalign_jax.types import Array, Int, Params


@functools.partial(jax.jit, static_argnames="config")
def held_out_terms(params: Params, batch: Batch, place: Int[Array, " B"], config: Config) -> dict[str, Array]:
    """Sums of the loss's terms over a batch and numbers of summands, [2], at noise and times fixed for each example.

    Args:
      params: of the model.
      batch: held-out examples, nothing dropped.
      place: index of each among the held-out examples, -1 for rows that do not count; over all of them, times cover the
        schedule evenly.
      config: of the run.
    """
    key, shape = jax.random.key(config.train.seed), batch.video_latents.shape[1:]
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(place)
    index = ((place + 0.5) * (config.model.flow.num_train_steps / config.data.held_out)).astype(jnp.int32)
    _, terms = objective(params, batch, noise, index, jnp.int32(0), config.model)
    counts = place >= 0
    aligned = counts & (batch.num_references > 0)
    summed = (("loss", counts), ("flow", counts), ("pull", aligned), ("push", aligned))
    return {name: jnp.stack([jnp.sum(getattr(terms, name) * rows), jnp.sum(rows)]) for name, rows in summed}


def held_out_batches(config: Config, source: Source, mesh: Mesh) -> Iterator[tuple[Batch, Int[Array, " B"]]]:
    """One pass over the held-out examples: batches, and the index of each row among the held-out examples.

    The last batch is filled up with the first examples again; the index of these rows is -1.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    data = config.data
    first = data.first_held_out(len(source))
    with contextlib.closing(open_loader(config, source, "held_out")) as loader:
        for start in range(0, data.held_out, data.batch_size):
            rows = next(loader)
            count = len(rows["index"])
            position = start + jax.process_index() * count + np.arange(count)
            place = np.where(position < data.held_out, rows["index"] - first, -1).astype(np.int32)
            yield as_batch(rows, mesh, config.model.alignment), to_devices(place, mesh)


def held_out_losses(params: Params, config: Config, source: Source, mesh: Mesh) -> dict[str, float]:
    """Means of the loss's terms over the held-out examples, named held_out_loss, held_out_flow and so on.

    pull and push are means over the examples with references. No mean depends on the batch size.
    """
    with jax.set_mesh(mesh):
        sums = [held_out_terms(params, *inputs, config) for inputs in held_out_batches(config, source, mesh)]
    found = {name: np.sum([jax.device_get(part[name]) for part in sums], axis=0) for name in sums[0]}
    return {f"held_out_{name}": float(total / max(count, 1)) for name, (total, count) in found.items()}
