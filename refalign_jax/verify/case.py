"""A transformer to verify: its weights, its inputs, and the report."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from refalign_jax.config import ModelConfig
from refalign_jax.convert.table import Entry
from refalign_jax.objective import Batch, all_aligned
from refalign_jax.types import Params
from refalign_jax.verify.report import Report
from refalign_jax.verify.values import Values


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and a folder of its values.

    Attributes:
      values: inputs, and what the other framework computed from them.
      report: receives the comparisons.
      config: of the model.
      table: published names of its parameters.
      params: its parameters, numpy arrays.
    """

    values: Values
    report: Report
    config: ModelConfig
    table: Sequence[Entry]
    params: Params

    @functools.cached_property
    def batch(self) -> Batch:
        """The training batch: one video per sample, and R references, each of its own subject."""
        targets = self.values.channels_last("vfm_features")  # [B, R, h, w, E]
        B, R = targets.shape[:2]
        return Batch(
            video_latents=self.values.channels_last("video_latents"),
            text=jnp.asarray(self.values.need("text")),
            reference_latents=self.values.channels_last("reference_latents"),
            num_references=jnp.full((B,), R),
            subject_ids=jnp.tile(jnp.arange(R), (B, 1)),
            vfm_features=targets.reshape(B, R, -1, targets.shape[-1]),
            aligned=all_aligned(B),
        )

    @functools.cached_property
    def noise(self) -> jax.Array:
        """The noise of the training batch, [B, F, H, W, C]."""
        return self.values.channels_last("noise")

    def indices(self, index: int) -> jax.Array:
        """The same index into the training schedule for each sample of the batch, [B]."""
        return jnp.full(self.batch.video_latents.shape[:1], index)
