"""A `VideoCodec` that needs no weights, to try out and test everything that comes after the VAE.

It has the VAE's causal geometry: the first frame by itself, then groups of four, each cut into blocks of t x s x s
pixels, t = 1 or 4. A 4-D orthonormal DCT over time, rows, columns and colour turns a block into as many coefficients.
The codec retains the C of largest variance under a first-order Markov model of video,

    cov(x, x') = σ_c² · ρ_s^(|Δy| + |Δx|) · ρ_t^|Δt|,    var(k) = σ_c² · v(k_t) v(k_y) v(k_x),  v = diag(D R Dᵀ),

with weights that give channel k the variance σ_k / mean σ, where σ_k is its standard deviation: coarse channels have
more than fine ones, so that a model learns them first and smooth areas come out smooth. Decoding latents and encoding
the result gives the same latents; encoding pixels and decoding the result gives their projection onto the retained
coefficients.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refalign_jax.types import Float

# Tuned on six photographs of scikit-image, panned slowly: σ_k is then 0.5 to 2 times the channel's deviation.
SPATIAL_CORRELATION = 0.93
"""Correlation of neighbouring pixels."""
TEMPORAL_CORRELATION = 0.98
"""Correlation of consecutive frames."""
COLOUR_DEVIATIONS = (0.7, 0.3, 0.12)
"""Standard deviations of (R + G + B) / √3, (R - B) / √2, (R - 2G + B) / √6: the DCT of colours in [-1, 1]."""
GROUP = 4
"""Frames in each latent frame except the first, which has one."""
VERSION = 2
"""Number of the codec's definition; it is raised when the latents of the same pixels change."""


def _cosines(n: int) -> Float[np.ndarray, "n n"]:
    """Returns the orthonormal DCT-II as a matrix with one row per frequency."""
    matrix = np.cos(np.pi / n * np.arange(n)[:, None] * (np.arange(n) + 0.5)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def _variances(n: int, correlation: float) -> Float[np.ndarray, " n"]:
    """Returns the variances of the DCT coefficients of n neighbours that have unit variance under the Markov model."""
    places = np.arange(n)
    return np.einsum("ki,ij,kj->k", _cosines(n), correlation ** np.abs(places[:, None] - places), _cosines(n))


def _bases(stride: int, channels: int) -> dict[int, Float[np.ndarray, "C t_s_s_3"]]:
    """Returns the retained basis functions, weighted, for blocks of one frame and of four.

    A frequency that is constant in time and retained for both has the same channel in both, at the same scale.
    """
    deviations, kept = {}, {}
    for t in (1, GROUP):
        space = _variances(stride, SPATIAL_CORRELATION)
        variances = np.einsum(
            "t,y,x,c->tyxc", _variances(t, TEMPORAL_CORRELATION), space, space, np.square(COLOUR_DEVIATIONS)
        )
        # Variances equal by symmetry may differ in the last bit; rounded and sorted stably, they give one order on
        # every machine.
        order = np.argsort(-np.round(variances, 9), axis=None, kind="stable")[:channels]
        kept[t] = [tuple(map(int, place)) for place in np.argwhere(np.ones_like(variances))[order]]
        deviations[t] = np.sqrt(variances)
    common = [place for place in kept[GROUP] if place in kept[1]]
    bases, mean = {}, np.mean([deviations[1][place] for place in kept[1]])
    for t in (1, GROUP):
        places = common + [place for place in kept[t] if place not in common]
        rows = [
            np.einsum(
                "t,y,x,c->tyxc", _cosines(t)[k], _cosines(stride)[y], _cosines(stride)[x], _cosines(3)[c]
            ).reshape(-1)
            * np.sqrt(deviations[t][k, y, x, c] / np.sqrt(t) / mean)
            / deviations[t][k, y, x, c]
            for k, y, x, c in places
        ]
        bases[t] = np.stack(rows).astype(np.float32)
    return bases


class DCTCodec:
    """A `VideoCodec` that retains the C DCT coefficients of largest variance in each block.

    Args:
      stride: side s of a block, 4 or 8 pixels.
      channels: C, at most 3·s².

    Raises:
      ValueError: another stride or number of channels.
    """

    def __init__(self, stride: int = 8, channels: int = 16) -> None:
        if stride not in (4, 8):
            raise ValueError(f"The DCT codec's stride is {stride}; it must be 4 or 8 pixels.")
        if not 1 <= channels <= 3 * stride**2:
            raise ValueError(f"The DCT codec has {channels} channels; with stride {stride}, 1 to {3 * stride**2} fit.")
        self.stride, self.channels = stride, channels
        self._bases = _bases(stride, channels)
        # The rows are orthogonal but not of unit length, so the inverse divides by their squared lengths.
        self._inverses = {t: basis / np.square(basis).sum(1, keepdims=True) for t, basis in self._bases.items()}

    def release(self) -> None:
        """Frees nothing, as there are no parameters."""

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the codec."""
        return {"name": "dct", "version": VERSION, "stride": self.stride, "channels": self.channels}

    def encode(self, videos: Float[np.ndarray, "B T h w 3"]) -> Float[np.ndarray, "B F H W C"]:
        """Encodes videos as `VideoCodec.encode` specifies."""
        s = self.stride
        B, T, h, w, _ = videos.shape
        if T % GROUP != 1 or h % s or w % s:
            raise ValueError(f"Videos of {T} frames of {h}x{w} pixels; give {GROUP}k+1 frames, sides multiples of {s}.")

        def transform(frames: np.ndarray, t: int) -> np.ndarray:
            blocks = frames.reshape(B, frames.shape[1] // t, t, h // s, s, w // s, s, 3)
            blocks = blocks.transpose(0, 1, 3, 5, 2, 4, 6, 7)
            return blocks.reshape(*blocks.shape[:4], t * s * s * 3) @ self._bases[t].T

        videos = videos.astype(np.float32)
        return np.concatenate([transform(videos[:, :1], 1), transform(videos[:, 1:], GROUP)], axis=1)

    def decode(self, latents: Float[np.ndarray, "B F H W C"]) -> Float[np.ndarray, "B T h w 3"]:
        """Decodes latents as `VideoCodec.decode` specifies."""
        s = self.stride
        B, _, H, W, channels = latents.shape
        if channels != self.channels:
            raise ValueError(f"Latents have {channels} channels; this DCT codec has {self.channels}.")

        def transform(cells: np.ndarray, t: int) -> np.ndarray:
            frames = cells.shape[1]
            blocks = (cells @ self._inverses[t]).reshape(B, frames, H, W, t, s, s, 3)
            return blocks.transpose(0, 1, 4, 2, 5, 3, 6, 7).reshape(B, frames * t, H * s, W * s, 3)

        latents = latents.astype(np.float32)
        return np.concatenate([transform(latents[:, :1], 1), transform(latents[:, 1:], GROUP)], axis=1)
