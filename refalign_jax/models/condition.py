"""What conditions a video: a prompt and references."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from refalign_jax.types import Array, Float, Int


class Condition(NamedTuple):
    """A prompt and, where there are any, references, for each sample of a batch.

    Attributes:
      text: embeddings of the prompt; padding rows are zero, and all rows are attended to.
      reference_latents: clean, normalised latents of the references, one frame each; None for plain text-to-video.
      num_references: how many of the R references of each sample are real. The rest is padding behind them, of any
        content, and invisible. None: all R.
    """

    text: Float[Array, "B S text_width"]
    reference_latents: Float[Array, "B R H W C"] | None = None
    num_references: Int[Array, " B"] | None = None

    def without_references(self) -> Condition:
        """The same with zero latents in place of the references, whose tokens and positions stay.

        This is what a dropped reference is in training and what guidance compares with; it is not the same as a
        condition that never had references.
        """
        if self.reference_latents is None:
            return self
        return self._replace(reference_latents=jnp.zeros_like(self.reference_latents))
