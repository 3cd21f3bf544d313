"""Latents as colours, to look at them without a decoder."""

from __future__ import annotations

import numpy as np

from refalign_jax.types import Float


def principal_colours(frames: Float[np.ndarray, "N H W C"]) -> Float[np.ndarray, "N H W rgb"]:
    """Projects latents onto their first three principal components, which become red, green and blue.

    All frames share the components. Each component is scaled from its 1st and 99th percentile to [0, 1] and clipped;
    with fewer than three channels, the remaining colours are 0.
    """
    pixels = frames.reshape(-1, frames.shape[-1])
    centred = pixels - pixels.mean(0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    components = centred @ axes[:, ::-1][:, :3]
    low, high = np.percentile(components, [1, 99], axis=0)
    colours = np.zeros((len(pixels), 3), np.float32)
    colours[:, : components.shape[1]] = np.clip((components - low) / np.maximum(high - low, 1e-6), 0, 1)
    return colours.reshape(*frames.shape[:-1], 3)
