"""Values of a training step, written for another framework to compute again.

The folder is the one that docs/verify.md describes and `tools/verify.py` reads: the inputs of the step as they were
drawn, with dropped conditions, noise and times; what the transformer and the loss made of them; every gradient, before
clipping. Arrays are in PyTorch layout, weights under the published names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from refalign_jax import flow
from refalign_jax.config import ModelConfig
from refalign_jax.convert.dit import model_table
from refalign_jax.convert.infer import describe
from refalign_jax.convert.table import to_published
from refalign_jax.convert.write import write_weights
from refalign_jax.models import dit
from refalign_jax.objective import PUBLISHED_TERMS, Batch, Times, terms_at
from refalign_jax.trainer.run import Run
from refalign_jax.trainer.state import TrainState
from refalign_jax.trainer.step import draw
from refalign_jax.types import Params

logger = logging.getLogger(__name__)


def write_dump(state: TrainState, batch: Batch, run: Run, done: int) -> None:
    """Writes the values of a step into verify/step-<done> of the run's folder, unless they are there already.

    Args:
      state: before the step.
      batch: of the step.
      run: opened.
      done: number of steps after it.

    Raises:
      OSError: they can't be written; nothing half-written is left.
    """
    folder = Path(run.config.train.folder) / "verify" / f"step-{done:08d}"
    if folder.exists():
        return
    model = model_at(run.config.model, done - 1)
    with jax.set_mesh(run.mesh):
        key = jax.random.fold_in(state.key, state.step)
        drawn, noise, index = draw(key, batch, run.empty_text, run.config)
        times = flow.lookup(flow.training_schedule(model.flow), index)
        values, gradient = step_values(state.params, drawn, noise, times, model=model)
    arrays = {**inputs(drawn, noise, index, model), **values}
    aligned = "projectors" in state.params and batch.reference_latents.shape[1] > 0
    config = {
        "num_heads": model.dit.num_heads,
        "eps": model.dit.eps,
        "shift": model.flow.shift,
        "align_blocks": model.alignment.num_blocks if aligned else 0,
        "vfm_dim": model.alignment.vfm_width,
        "scalars": list(PUBLISHED_TERMS),
        "compute_dtype": model.dit.compute_dtype,
        "step": done,
    }
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        np.savez(partial / "values.npz", **{name: np.asarray(x) for name, x in arrays.items()})  # type: ignore[arg-type]
        for name, tree in (("weights", state.params), ("grads_step", gradient)):
            used = tree if aligned else {"dit": tree["dit"]}
            _write_tree(partial / f"{name}.safetensors", used, model)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("Values of step %d are in %s.", done, folder)


def model_at(model: ModelConfig, step: int) -> ModelConfig:
    """The model as it trains at a step: without alignment where that has stopped."""
    alignment = model.alignment
    stopped = bool(alignment.stop_step) and step >= alignment.stop_step
    weight = 0.0 if stopped else alignment.weight
    return dataclasses.replace(model, alignment=dataclasses.replace(alignment, weight=weight, stop_step=0))


def inputs(batch: Batch, noise: jax.Array, index: jax.Array, model: ModelConfig) -> dict[str, Any]:
    """What the step was computed from, float32, channels second."""
    arrays: dict[str, Any] = {
        "video_latents": _channels_second(batch.video_latents),
        "noise": _channels_second(noise),
        "text": jnp.asarray(batch.text, jnp.float32),
        "index": index,
    }
    if batch.reference_latents.shape[1]:
        B, R, P, E = batch.vfm_features.shape
        rows, columns = dit.token_grid(model.dit, batch.reference_latents.shape)[1:]
        arrays |= {
            "reference_latents": _channels_second(batch.reference_latents),
            "num_references": batch.counts,
            "subject_ids": batch.subject_ids,
            "aligned": batch.aligned,
        }
        if rows * columns == P:
            arrays["vfm_features"] = _channels_second(batch.vfm_features.reshape(B, R, rows, columns, E))
    return arrays


@functools.partial(jax.jit, static_argnames="model")
def step_values(params: Params, batch: Batch, noise: jax.Array, times: Times, *, model: ModelConfig) -> Any:
    """The step's values by the names of values.npz, and the gradient of every parameter."""

    def loss(params: Params) -> Any:
        terms, velocity = terms_at(params, batch, noise, times, jnp.int32(0), model)
        return jnp.mean(terms.loss), (terms, velocity)

    gradient, (terms, velocity) = jax.grad(loss, has_aux=True)(params)
    noisy, target = flow.corrupt(batch.video_latents, noise, times[0])
    values = {
        "step_timestep": times[1],
        "step_noisy": _channels_second(noisy),
        "step_target": _channels_second(target),
        "step_velocity": _channels_second(velocity),
        "step_scalars": jnp.stack([jnp.mean(getattr(terms, field)) for field in PUBLISHED_TERMS.values()]),
    }
    if batch.reference_latents.shape[1]:
        observer = dit.reference_tokens(model.dit, model.alignment.num_blocks, batch.reference_latents.shape)
        tokens = dit.observe(params["dit"], model.dit, noisy, times[1], batch.condition, observer)[1]
        values["step_ref_features"] = tokens.astype(jnp.float32).reshape(*tokens.shape[:2], -1, tokens.shape[-1])
    return values, gradient


def _channels_second(x: jax.Array) -> jax.Array:
    return jnp.moveaxis(x.astype(jnp.float32), -1, 1)


def _write_tree(path: Path, tree: Mapping[str, Any], model: ModelConfig) -> None:
    """Writes parameters, or their gradients, under the published names."""
    table = model_table(model.dit, model.alignment if "projectors" in tree else None)
    tensors = {name: np.asarray(x, np.float32) for name, x in to_published(table, jax.device_get(tree))}
    shapes = {name: x.shape for name, x in tensors.items()}
    dtypes = {name: x.dtype for name, x in tensors.items()}
    write_weights(path, tensors.items(), shapes, dtypes, metadata=describe(model))
