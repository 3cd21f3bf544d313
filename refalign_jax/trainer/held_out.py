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
from refalign_jax.data.mixture import Source, names_of
from refalign_jax.objective import Batch, objective
from refalign_jax.sharding import to_devices
from refalign_jax.trainer.preflight import open_loader
from refalign_jax.trainer.step import as_batch
from refalign_jax.types import Array, Int, Params


@functools.partial(jax.jit, static_argnames="config")
def held_out_terms(
    params: Params, batch: Batch, place: Int[Array, " B"], dataset: Int[Array, " B"], config: Config
) -> dict[str, Array]:
    """Sums of the loss's terms over a batch and numbers of summands, at noise and times fixed for each example.

    Args:
      params: of the model.
      batch: held-out examples, nothing dropped.
      place: index of each among the held-out examples, -1 for rows that do not count; over all of them, times cover the
        schedule evenly.
      dataset: number of the dataset of each.
      config: of the run.

    Returns:
      [datasets, 2] of each term.
    """
    key, shape = jax.random.key(config.train.seed), batch.video_latents.shape[1:]
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32))(place)
    index = ((place + 0.5) * (config.model.flow.num_train_steps / config.data.held_out)).astype(jnp.int32)
    _, terms = objective(params, batch, noise, index, jnp.int32(0), config.model)
    counts = place >= 0
    aligned = counts & (batch.counts > 0)
    summed = (("loss", counts), ("flow", counts), ("pull", aligned), ("push", aligned))
    member = jax.nn.one_hot(dataset, len(config.data.parts))

    def sums(values: Array, rows: Array) -> Array:
        return jnp.stack([(values * rows) @ member, rows.astype(jnp.float32) @ member], axis=-1)

    return {name: sums(getattr(terms, name), rows) for name, rows in summed}


def held_out_batches(
    config: Config, source: Source, mesh: Mesh
) -> Iterator[tuple[Batch, Int[Array, " B"], Int[Array, " B"]]]:
    """One pass over the held-out examples: batches, each row's number among the held-out examples, and its dataset's.

    The last batch is filled up with the first examples again; the number of these rows is -1.
    """
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, num_workers=0))
    data = config.data
    with contextlib.closing(open_loader(config, source, "held_out")) as loader:
        for start in range(0, data.held_out, data.batch_size):
            rows = next(loader)
            count = len(rows["index"])
            position = start + jax.process_index() * count + np.arange(count)
            place = np.where(position < data.held_out, rows["place"], -1).astype(np.int32)
            yield (
                as_batch(rows, config, source.spec, mesh),
                to_devices(place, mesh),
                to_devices(rows["dataset"], mesh),
            )


def held_out_losses(params: Params, config: Config, source: Source, mesh: Mesh) -> dict[str, float]:
    """Means of the loss's terms over the held-out examples, named held_out_loss, held_out_flow and so on.

    pull and push are means over the examples with references. No mean depends on the batch size. Of a mixture, each
    dataset's own means are there too, named as held_out_loss/NAME.
    """
    with jax.set_mesh(mesh):
        sums = [held_out_terms(params, *inputs, config) for inputs in held_out_batches(config, source, mesh)]
    found = {name: np.sum([jax.device_get(part[name]) for part in sums], axis=0) for name in sums[0]}
    means = {f"held_out_{name}": _mean(parts.sum(axis=0)) for name, parts in found.items()}
    for number, dataset in enumerate(names_of(config.data.paths) if config.data.mix else ()):
        means |= {f"held_out_{name}/{dataset}": _mean(parts[number]) for name, parts in found.items()}
    return means


def _mean(total: np.ndarray) -> float:
    """The mean of what (sum, number of summands) add up."""
    return float(total[0] / max(total[1], 1))
