"""One training step: conditions dropped and noise drawn, loss and gradient, update; and its compilation.

u, noise, i  ~  fold_in(key, step)
loss(θ)   = mean over the batch of w(t_i)·MSE + λ·g(t_i)·L_RA           (objective.py)
θ, m, v   ← AdamW(∇loss)                                                (optimizer.py)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from refalign_jax.alignment import SubjectPatches
from refalign_jax.config import FIELDS, Config, DropoutConfig
from refalign_jax.data.examples import Spec
from refalign_jax.objective import Batch, Terms, objective
from refalign_jax.sharding import BATCH, replicated, to_devices
from refalign_jax.trainer.optimizer import learning_rate, merge, moving_average, split, update
from refalign_jax.trainer.state import TrainState
from refalign_jax.trees import count
from refalign_jax.types import Array, Float, Int, Key, Params

logger = logging.getLogger(__name__)


def drop_conditions(
    batch: Batch, u: Float[Array, " B"], empty_text: Float[Array, "S text_width"], config: DropoutConfig
) -> Batch:
    """Drops text, references or both from some samples.

    Args:
      batch: the samples.
      u: uniform in [0, 1): the lowest share `text` drops the text, the next `references` the references, then `both`.
      empty_text: embedding of the empty prompt, padding rows zero; it replaces a dropped text.
      config: the shares.

    Returns:
      The batch. Dropped references become as many frames of zero latents, and their samples are not aligned.
    """
    first, second, third = np.cumsum([config.text, config.references, config.both])
    no_text = (u < first) | ((u >= second) & (u < third))
    no_references = (u >= first) & (u < third)
    return batch._replace(
        text=jnp.where(no_text[:, None, None], empty_text.astype(batch.text.dtype), batch.text),
        reference_latents=jnp.where(no_references[:, None, None, None, None], 0, batch.reference_latents),
        aligned=batch.aligned & ~no_references,
    )


def draw(
    key: Key[Array, ""], batch: Batch, empty_text: Float[Array, "S text_width"], config: Config
) -> tuple[Batch, Float[Array, "B F H W C"], Int[Array, " B"]]:
    """Draws what is random in one step: dropped conditions, noise, and each sample's index in the training schedule."""
    noise_key, index_key, dropout_key = jax.random.split(key, 3)
    samples = batch.video_latents.shape[0]
    noise = jax.random.normal(noise_key, batch.video_latents.shape, jnp.float32)
    index = jax.random.randint(index_key, (samples,), 0, config.model.flow.num_train_steps)
    u = jax.random.uniform(dropout_key, (samples,))
    return drop_conditions(batch, u, empty_text, config.dropout), noise, index


def train_step(
    state: TrainState, batch: Batch, noise: Float[Array, "B F H W C"], index: Int[Array, " B"], config: Config
) -> tuple[TrainState, dict[str, Array]]:
    """One step of training, pure.

    Args:
      state: before the step.
      batch: what to train on.
      noise: standard normal.
      index: of each sample in the training schedule.
      config: of the run.

    Returns:
      The state after the step, and scalars: the batch means of the loss's terms (those of the alignment over aligned
      samples alone), gradient norm before clipping, learning rate, and `skipped`. If the loss or the gradient is not
      finite, parameters, moving average and moments stay as they were, and `skipped` counts up.
    """
    trained, frozen = split(state.params, config.optimizer.freeze)

    def loss(trained: Params, batch: Batch, noise: Array, index: Array) -> tuple[Array, Terms]:
        return objective(merge(trained, frozen), batch, noise, index, state.step, config.model)

    terms, gradients = mean_gradient(loss, trained, (batch, noise, index), config.optimizer.accumulation)
    norm = optax.tree.norm(gradients)
    rate = learning_rate(state.step, config.optimizer, config.train.steps)
    with jax.named_scope("optimizer"):
        trained, moments = update(gradients, state.optimizer, trained, rate, config.optimizer)
        params = merge(trained, frozen)
        ema = None if state.ema is None else moving_average(state.ema, params, config.optimizer.ema_decay)

    finite = jnp.isfinite(jnp.mean(terms.loss)) & jnp.isfinite(norm)
    params, ema, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old),
        (params, ema, moments),
        (state.params, state.ema, state.optimizer),
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    metrics = {**mean_terms(terms, batch), "grad_norm": norm, "learning_rate": rate, "skipped": skipped}
    return TrainState(state.step + 1, skipped, state.key, params, ema, moments), metrics


def mean_gradient(
    loss: Callable[..., tuple[Array, Terms]], trained: Params, inputs: tuple[Any, ...], parts: int
) -> tuple[Terms, Params]:
    """Terms of every sample, and the gradient of the mean loss, accumulated over `parts` parts of the batch."""
    gradient = jax.grad(loss, has_aux=True)
    if parts == 1:
        gradients, terms = gradient(trained, *inputs)
        return terms, gradients
    # A part takes every parts-th sample, so that every device finds its share of each part among the rows it holds.
    split_up = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), inputs)

    def add(total: Params, part: Any) -> tuple[Params, Terms]:
        gradients, terms = gradient(trained, *part)
        return jax.tree.map(jnp.add, total, gradients), terms

    total, terms = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, trained), split_up)
    terms = jax.tree.map(lambda x: x.T.reshape(-1), terms)
    return terms, jax.tree.map(lambda x: x / parts, total)


def mean_terms(terms: Terms, batch: Batch) -> dict[str, Array]:
    """Batch means of the loss's terms by name; pull, push and alignment over the aligned samples with references."""
    aligned = batch.aligned & (batch.counts > 0)
    means = {name: jnp.mean(value) for name, value in terms._asdict().items()}
    for name in ("pull", "push", "alignment"):
        means[name] = jnp.sum(getattr(terms, name) * aligned) / jnp.maximum(jnp.sum(aligned), 1)
    return means


def as_batch(rows: Mapping[str, np.ndarray], config: Config, spec: Spec, mesh: Mesh) -> Batch:
    """The global batch on the devices, from the rows that each process's loader gave; every sample is aligned.

    Args:
      rows: of this process.
      config: of the run.
      spec: of the dataset. `Batch.num_references` is None if no batch has a padded reference.
      mesh: the devices.
    """
    arrays: dict[str, Any] = {**rows, "aligned": np.ones(len(rows["num_references"]), bool), "patches": None}
    if not spec.pads(config.data.max_references):
        arrays["num_references"] = None
    if config.model.alignment.needs_subject_mask:
        mask: Any = rows["subject_mask"]
        mean: Any = rows.get("target_mean")
        arrays["patches"] = SubjectPatches(mask, mean)
    return Batch(**to_devices({name: arrays[name] for name in Batch._fields}, mesh))


def batch_shapes(config: Config, spec: Spec, mesh: Mesh) -> Batch:
    """Shape, dtype and sharding of every array of a batch, as `as_batch` makes it of the loader's rows.

    Args:
      config: of the run.
      spec: of the dataset.
      mesh: the devices.
    """
    data = config.data
    R, (F, H, W, C) = data.max_references, spec.video_latents
    shapes = {
        "video_latents": (F, H, W, C),
        "text": (data.text_length, spec.text_width),
        "reference_latents": (R, H, W, C),
        "num_references": (),
        "subject_ids": (R,),
        "vfm_features": (R, spec.vfm_tokens, spec.vfm_width),
        "aligned": (),
        "mask": (R, spec.vfm_tokens),
        "mean": (spec.vfm_width,),
    }
    dtypes = {"num_references": "int32", "subject_ids": "int32", "aligned": "bool", "mask": "bool", "mean": "float32"}
    for name in FIELDS:
        stored = getattr(spec.storage, name)
        dtypes[name] = "float32" if data.dtype == "float32" or stored == "int8" else stored
    sharding = NamedSharding(mesh, BATCH)

    def of(name: str) -> Any:
        shape = (data.batch_size, *shapes[name])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtypes[name]), sharding=sharding)

    arrays: dict[str, Any] = {name: of(name) for name in Batch._fields if name != "patches"}
    if not spec.pads(R):
        arrays["num_references"] = None
    if config.model.alignment.needs_subject_mask:
        dataset_mean = config.model.alignment.center_targets == "dataset"
        arrays["patches"] = SubjectPatches(of("mask"), of("mean") if dataset_mean else None)
    return Batch(**arrays)


def lower_step(state: TrainState, batch: Batch, empty_text: Any, config: Config, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the loop's one program: draw and step, with the state donated.

    Args:
      state: arrays, or shapes with shardings, as `state_shapes` gives them.
      batch: arrays, or shapes with shardings, as `batch_shapes` gives them.
      empty_text: embedding of the empty prompt, [S, text_width].
      config: of the run.
      mesh: the devices.
    """

    def program(state: TrainState, batch: Batch, empty_text: Array) -> tuple[TrainState, dict[str, Array]]:
        step_key = jax.random.fold_in(state.key, state.step)
        return train_step(state, *draw(step_key, batch, empty_text, config), config)

    places = jax.tree.map(lambda x: x.sharding, state), replicated(mesh)
    with jax.set_mesh(mesh):
        return jax.jit(program, donate_argnums=0, out_shardings=places).lower(state, batch, empty_text)


def compile_step(
    state: TrainState, batch: Batch, empty_text: Array, config: Config, mesh: Mesh
) -> tuple[Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]], dict[str, float]]:
    """Compiles the loop's one program; arguments as in `lower_step`.

    Returns:
      The program; seconds of compilation, number of parameters, and bytes per device beside the state and the batch.
    """
    logger.info("Compiling the training step.")
    began = time.perf_counter()
    compiled = lower_step(state, batch, empty_text, config, mesh).compile()
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    needed = memory.temp_size_in_bytes if memory else 0
    logger.info("Compiled in %.1f s; a device needs %.3f GB beside state and batch.", seconds, needed / 1e9)
    return compiled, {"compile_seconds": seconds, "parameters": count(state.params), "temporary_bytes": needed}
