"""The three interfaces of frozen encoders; everything else in the package knows encoders by these alone.

`describe` returns JSON. It goes into a dataset's manifest and identifies the encoder: a dataset is continued with the
same one only, and `open.reopen_video_codec` and `open.reopen_text_encoder` open the encoder from it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from refalign_jax.types import Float


class VideoCodec(Protocol):
    """Videos to latents and back, causal in time: the first frame by itself, then groups of four."""

    stride: int
    """Side of a latent pixel, in pixels of the video."""
    channels: int
    """C."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the codec."""
        ...

    def encode(self, videos: Float[np.ndarray, "B T h w 3"]) -> Float[np.ndarray, "B F H W C"]:
        """Encodes videos, or images as videos of one frame.

        Args:
          videos: RGB in [-1, 1], T = 4k+1 frames, rows and columns multiples of `stride`.

        Returns:
          Normalised latents of about unit variance, float32, F = k+1.

        Raises:
          ValueError: another number of frames, or another size.
        """
        ...

    def decode(self, latents: Float[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B T h w 3"]:
        """Decodes normalised latents into RGB.

        Returns:
          Float32, mostly in [-1, 1] but not clipped to it; T = 4(F−1)+1.

        Raises:
          ValueError: another number of channels.
        """
        ...

    def release(self) -> None:
        """Frees the memory of the parameters, if there are any; the next call reads them again."""
        ...


class TextEncoder(Protocol):
    """Prompts to embeddings."""

    width: int
    """Width of an embedding."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        ...

    def encode(self, prompts: Sequence[str]) -> list[Float[np.ndarray, "S width"]]:
        """Embeds prompts.

        Returns:
          The embeddings of each prompt without padding, float32, 1 ≤ S ≤ 512. The empty prompt has at least one.
        """
        ...

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Counts the tokens that each prompt would have if none were cut; `encode` keeps the first 512."""
        ...

    def release(self) -> None:
        """Frees the memory of the parameters, if there are any; the next call reads them again."""
        ...


class FeatureEncoder(Protocol):
    """A vision foundation model (VFM): images to features on a grid of patches."""

    patch_size: int
    """Side of a patch in pixels: twice the codec's stride, so that the VFM's grid is the DiT's."""
    width: int
    """E."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        ...

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Computes the features of every patch.

        Args:
          images: RGB in [-1, 1], rows and columns multiples of `patch_size`.

        Returns:
          Float32, rows = h / patch_size, columns = w / patch_size.

        Raises:
          ValueError: another size.
        """
        ...
