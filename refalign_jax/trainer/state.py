"""The state of training: made, laid out on the devices, saved and restored."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from refalign_jax.config import Config
from refalign_jax.convert.checkpoint import ARRAYS
from refalign_jax.convert.load import initial_params
from refalign_jax.initial import random_params
from refalign_jax.sharding import bytes_per_device, place_shapes, replicated
from refalign_jax.trainer.checkpoint import Checkpoints
from refalign_jax.trainer.optimizer import init_optimizer
from refalign_jax.trainer.preflight import check_disk, check_same_run
from refalign_jax.trees import count
from refalign_jax.types import Array, Key, Params

logger = logging.getLogger(__name__)


class TrainState(NamedTuple):
    """All that a step changes, and the random key.

    Attributes:
      step: int32, number of steps done.
      skipped: int32, number of batches skipped in a row up to now.
      key: from which all randomness of training is derived; it never changes.
      params: {"dit": …, "projectors": …}, float32.
      ema: their moving average; None where none is kept.
      optimizer: AdamW's moments of the trained parameters.
    """

    step: Array
    skipped: Array
    key: Array
    params: Params
    ema: Params | None
    optimizer: Any


def init_state(params: Params, key: Key[Array, ""], config: Config) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    ema = params if config.optimizer.ema_decay else None
    return TrainState(zero, zero, key, params, ema, init_optimizer(params, config.optimizer))


def state_shapes(config: Config, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every array of the state, without making one."""
    shapes = jax.eval_shape(lambda key: init_state(random_params(config.model, key), key, config), jax.random.key(0))
    return place_shapes(shapes, mesh)


def begin(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any] | None]:
    """The state of the newest checkpoint or, where there is none, that of a fresh run.

    Returns:
      The state, made on its devices, and the saved position of the data iterator; None in a fresh run.

    Raises:
      ValueError: the checkpoint is of another run or damaged, or `train.init` does not fit the model.
      OSError: the disk has no room for a checkpoint.
    """
    shapes = state_shapes(config, mesh)
    held = bytes_per_device(shapes)
    logger.info("%s parameters; a device holds %.3f GB of the state.", f"{count(shapes.params):,}", held / 1e9)
    check_room(shapes, checkpoints)

    step = checkpoints.latest
    if step is None:
        init_key, key = jax.random.split(jax.random.key(config.train.seed))
        given, verify = config.train, config.train.verify_checkpoints
        params, origin = initial_params(given.init, given.init_ema, config.model, shapes.params, init_key, verify)
        logger.info(origin)
        place = jax.tree.map(lambda x: x.sharding, shapes)
        return jax.jit(lambda params, key: init_state(params, key, config), out_shardings=place)(params, key), None

    path = str(checkpoints.path(step))
    for difference in check_same_run(checkpoints.read_config(step), dataclasses.asdict(config), path):
        logger.info("Since %s: %s.", path, difference)
    arrays, progress = checkpoints.restore(step, array_items(shapes))
    small = jax.jit(lambda *x: (*x[:2], jax.random.wrap_key_data(x[2])), out_shardings=replicated(mesh))(
        np.int32(progress["step"]), np.int32(progress["skipped"]), np.array(progress["key"], np.uint32)
    )
    logger.info("Continuing from step %d, %s.", step, path)
    return TrainState(*small, **{"ema": None, **arrays}), progress["data"]


def save(
    state: TrainState, data: Mapping[str, Any], config: Config, made: Mapping[str, Any], checkpoints: Checkpoints
) -> None:
    """Begins to write a checkpoint of the state, unless its step has one.

    Args:
      state: to be saved; may be donated when this returns.
      data: state of the data iterator.
      config: of the run.
      made: what `provenance.about` returned.
      checkpoints: of the run.

    Raises:
      OSError: it can't be written, or the disk has no room for it.
    """
    step = int(state.step)
    if checkpoints.latest == step:
        return
    check_room(state, checkpoints)
    progress = {
        "step": step,
        "skipped": int(state.skipped),
        "key": np.asarray(jax.random.key_data(state.key)).tolist(),
        "data": dict(data),
        "about": dict(made),
    }
    checkpoints.save(step, array_items(state), progress, dataclasses.asdict(config))


def check_room(state: TrainState, checkpoints: Checkpoints) -> None:
    """Refuses a local disk that has no room for one more checkpoint of the state, arrays or shapes.

    Raises:
      OSError: too little room.
    """
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(array_items(state)))
    check_disk(str(checkpoints.folder), size)


def array_items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint that hold arrays."""
    return {name: getattr(state, name) for name in ARRAYS if getattr(state, name) is not None}
