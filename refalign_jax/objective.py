"""The training objective: flow matching plus reference alignment, per sample and then the mean over the batch.

    loss = w(t)·MSE(v, noise - x₀) + λ·g(t)·L_RA

Pure: parameters, batch, noise and schedule indices in; loss and its terms out. Nothing random happens here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from refalign_jax import alignment, flow
from refalign_jax.config import ModelConfig
from refalign_jax.models import transformer
from refalign_jax.models.condition import Condition
from refalign_jax.types import Array, Bool, Float, Int, Params


class Batch(NamedTuple):
    """What one step trains on. Latents are normalised; any float dtype.

    Attributes:
      video_latents: [B, F, H, W, C].
      text: [B, S, text_width], padding rows zero.
      reference_latents: [B, R, H, W, C]; R may be 0.
      num_references: [B], how many of the R references are real; the others are padding behind them. None: all are
        real, and attention is compiled without lengths.
      subject_ids: [B, R], which subject a reference shows.
      vfm_features: [B, R, P, E], the VFM's features of the references, which they are aligned with.
      aligned: [B], False where the references were dropped, so that the sample has no alignment loss.
      patches: which VFM tokens show a subject, [B, R, P]; None unless the alignment's options need it.
    """

    video_latents: Array
    text: Array
    reference_latents: Array
    num_references: Array | None
    subject_ids: Array
    vfm_features: Array
    aligned: Array
    patches: alignment.SubjectPatches | None = None

    @property
    def counts(self) -> Int[Array, " B"]:
        """How many references of each sample are real."""
        samples, count = self.reference_latents.shape[:2]
        return jnp.full(samples, count) if self.num_references is None else self.num_references

    @property
    def condition(self) -> Condition:
        """The prompts and references."""
        if not self.reference_latents.shape[1]:
            return Condition(self.text)
        return Condition(self.text, self.reference_latents, self.num_references)


Times = tuple[Float[Array, " B"], Float[Array, " B"], Float[Array, " B"]]
"""Share of noise, time and weight of each sample, as `flow.lookup` returns them."""


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


PUBLISHED_TERMS: Mapping[str, str] = {
    "mse": "flow",
    "weight": "weight",
    "gate": "gate",
    "ra_total(pos+neg)": "alignment",
    "ra_pos": "pull",
    "ra_neg": "push",
    "loss": "loss",
}
"""What the published code calls the fields of `Terms`."""


def sample_terms(
    params: Params,
    batch: Batch,
    noise: Float[Array, "B F H W C"],
    index: Int[Array, " B"],
    step: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Terms, Float[Array, "B F H W C"]]:
    """Computes the terms of every sample's loss, and the velocity on the way to them.

    Args:
      params: {"dit": …} and, where the alignment weight is not 0, {"projectors": …}.
      batch: what to train on.
      noise: standard normal.
      index: each sample's index into the training schedule, in [0, num_train_steps).
      step: training step, which `AlignmentConfig.stop_step` is compared with.
      config: transformer, alignment and flow.
    """
    return terms_at(params, batch, noise, flow.lookup(flow.training_schedule(config.flow), index), step, config)


def terms_at(
    params: Params,
    batch: Batch,
    noise: Float[Array, "B F H W C"],
    times: Times,
    step: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Terms, Float[Array, "B F H W C"]]:
    """As `sample_terms`, at any times: σ, t and w of each sample."""
    sigma, t, _ = times
    noisy, target = flow.corrupt(batch.video_latents, noise, sigma)
    inputs = params["dit"], config.dit, noisy, t, batch.condition
    if config.alignment.weight > 0 and batch.condition.reference_latents is not None:
        observer = alignment.observer(params["projectors"], batch_targets(batch, config), config.alignment, step)
        velocity, terms = transformer.observe(*inputs, observer)
        pull, push = (jnp.mean(x, axis=0) * batch.aligned for x in terms)
    else:
        velocity = transformer.velocity(*inputs)
        pull = push = jnp.zeros_like(t)
    return join_terms(flow.flow_errors(velocity, target), pull, push, times, step, config), velocity


def join_terms(
    errors: Float[Array, " B"],
    pull: Float[Array, " B"],
    push: Float[Array, " B"],
    times: Times,
    step: Int[Array, ""],
    config: ModelConfig,
) -> Terms:
    """The loss of each sample from the error of its velocity, L₊ and L₋; the other arguments as in `terms_at`."""
    _, t, weight = times
    gate = alignment.gate(t, config.alignment)
    aligned = alignment.alignment_loss(pull, push, config.alignment)
    loss = weight * errors + alignment.schedule_weight(step, config.alignment) * gate * aligned
    return Terms(errors, weight, gate, pull, push, aligned, loss)


def batch_targets(batch: Batch, config: ModelConfig) -> alignment.Targets:
    """The targets of a batch's reference tokens; errors as in `alignment.make_targets`."""
    grid = transformer.token_grid(config.dit, batch.reference_latents.shape)[1:]
    features, ids, counts = batch.vfm_features, batch.subject_ids, batch.counts
    return alignment.make_targets(features, ids, counts, grid, config.alignment, batch.patches)


def objective(
    params: Params,
    batch: Batch,
    noise: Float[Array, "B F H W C"],
    index: Int[Array, " B"],
    step: Int[Array, ""],
    config: ModelConfig,
) -> tuple[Float[Array, ""], Terms]:
    """Returns the mean loss of the batch, and its terms; arguments as in `sample_terms`."""
    terms, _ = sample_terms(params, batch, noise, index, step, config)
    return jnp.mean(terms.loss), terms


def all_aligned(batch_size: int) -> Bool[Array, " B"]:
    """`Batch.aligned` where no reference was dropped."""
    return jnp.ones(batch_size, bool)
