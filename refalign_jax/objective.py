"""The training objective: flow matching plus reference alignment, per sample and then the mean over the batch.

    loss = w(t)·MSE(v, noise - x₀) + λ·g(t)·L_RA

Pure: parameters, batch, noise and schedule indices in; loss and its terms out. Nothing random happens here.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from refalign_jax import alignment, flow
from refalign_jax.config import ModelConfig
from refalign_jax.models.dit import DiT
from refalign_jax.types import Array, Bool, Float, Int, Params


class Batch(NamedTuple):
    """What one step trains on. Latents are normalised; any float dtype.

    Attributes:
      video_latents: [B, F, H, W, C].
      text: [B, S, text_width], padding rows zero.
      reference_latents: [B, R, H, W, C].
      num_references: [B], how many of the R are real; the others stand behind them.
      subject_ids: [B, R].
      vfm_features: [B, R, P, E], targets of the alignment.
      aligned: [B], False where the references were dropped, so that the sample has no alignment loss.
    """

    video_latents: Array
    text: Array
    reference_latents: Array
    num_references: Array
    subject_ids: Array
    vfm_features: Array
    aligned: Array


class Terms(NamedTuple):
    """The parts of each sample's loss, float32 [B].

    Attributes:
      flow: mean squared error of the velocity, unweighted.
      weight: w(t).
      gate: g(t).
      pull: L₊, mean over aligned blocks.
      push: L₋, mean over aligned blocks.
      alignment: L_RA, from pull and push.
      loss: the total.
    """

    flow: Array
    weight: Array
    gate: Array
    pull: Array
    push: Array
    alignment: Array
    loss: Array


def sample_terms(
    params: Params,
    batch: Batch,
    noise: Float[Array, "B F H W C"],
    index: Int[Array, " B"],
    step: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Terms, Float[Array, "B F H W C"]]:
    """The terms of every sample's loss, and the velocity on the way to them.

    Args:
      params: {"dit": …} and, where the alignment weight is not 0, {"projectors": …}.
      batch: what to train on.
      noise: standard normal.
      index: place of each sample in the training schedule, in [0, num_train_steps).
      step: training step, from which `AlignmentConfig.stop_step` counts.
      config: of the transformer, the alignment and the flow.
    """
    sigma, t, weight = flow.lookup(flow.training_schedule(config.flow), index)
    noisy, target = flow.corrupt(batch.video_latents, noise, sigma)
    any_references = batch.reference_latents.shape[1] > 0
    transformer = functools.partial(
        DiT(config.dit).apply,
        {"params": params["dit"]},
        noisy,
        t,
        batch.text,
        batch.reference_latents if any_references else None,
        batch.num_references if any_references else None,
    )
    outputs: Any
    if config.alignment.weight > 0 and any_references:
        grid = config.dit.token_grid(*batch.reference_latents.shape[1:4])[1:]
        targets = alignment.make_targets(
            batch.vfm_features, batch.subject_ids, batch.num_references, grid, config.alignment
        )
        outputs = transformer(
            num_feature_blocks=config.alignment.num_blocks,
            tap=lambda projector, tokens: alignment.block_terms(projector, tokens, targets, grid, config.alignment),
            tap_params=params["projectors"],
        )
        velocity, terms = outputs
        pull, push = (jnp.mean(x, axis=0) * batch.aligned for x in terms)
    else:
        outputs = transformer()
        velocity = outputs[0]
        pull = push = jnp.zeros_like(t)
    errors = flow.flow_errors(velocity, target)
    gate = alignment.gate(t, config.alignment)
    aligned = alignment.alignment_loss(pull, push, config.alignment)
    loss = weight * errors + alignment.schedule_weight(step, config.alignment) * gate * aligned
    return Terms(errors, weight, gate, pull, push, aligned, loss), velocity


def objective(
    params: Params,
    batch: Batch,
    noise: Float[Array, "B F H W C"],
    index: Int[Array, " B"],
    step: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Float[Array, ""], Terms]:
    """The mean loss of the batch, and its terms; arguments as in `sample_terms`."""
    terms, _ = sample_terms(params, batch, noise, index, step, config)
    return jnp.mean(terms.loss), terms


def all_aligned(batch_size: int) -> Bool[Array, " B"]:
    """`Batch.aligned` where no reference was dropped."""
    return jnp.ones(batch_size, bool)
