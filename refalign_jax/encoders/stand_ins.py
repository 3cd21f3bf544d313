"""Encoders that need no weights, to try and test all that comes after them; RefAlign itself is trained with others.

DCT codec, for the VAE. The same causal geometry: the first frame by itself, then groups of four, each cut into blocks
of t x s x s pixels, t = 1 or 4. A 4-D orthonormal DCT over time, rows, columns and colour turns a block into as many
coefficients. Kept are the C of largest variance under a first-order Markov model of video,

    cov(x, x') = σ_c² · ρ_s^(|Δy| + |Δx|) · ρ_t^|Δt|,    var(k) = σ_c² · v(k_t) v(k_y) v(k_x),  v = diag(D R Dᵀ),

each divided by its standard deviation. Encoding what was decoded gives the same latents; decoding what was encoded
gives the projection of the pixels onto the kept coefficients.

Word hashes, for UMT5. Each word is a Gaussian vector that its SHA-256 seeds, without regard to its place, and an end
token follows, so that the empty prompt has an embedding too.

DAISY (Tola et al. 2010), for DINOv3. Gradient histograms around the centre of each patch, and the patch's mean colour.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from skimage.feature import daisy

from refalign_jax.config import MAX_TEXT_LENGTH
from refalign_jax.types import Float

# Tuned on six photographs of scikit-image panned slowly: each channel then has a deviation of 0.2 to 2.
SPATIAL_CORRELATION = 0.93
"""Of pixels side by side."""
TEMPORAL_CORRELATION = 0.98
"""Of frames one after the other."""
COLOUR_DEVIATIONS = (0.7, 0.3, 0.12)
"""Of (R + G + B) / √3, (R - B) / √2, (R - 2G + B) / √6, the DCT of three colours in [-1, 1], around mid-grey."""
GROUP = 4
"""Frames of each latent frame but the first."""


def _cosines(n: int) -> Float[np.ndarray, "n n"]:
    """The orthonormal DCT-II as a matrix, a row a frequency."""
    matrix = np.cos(np.pi / n * np.arange(n)[:, None] * (np.arange(n) + 0.5)) * np.sqrt(2 / n)
    matrix[0] /= np.sqrt(2)
    return matrix


def _variances(n: int, correlation: float) -> Float[np.ndarray, " n"]:
    """Variance of each DCT coefficient of n neighbours of unit variance under the Markov model."""
    places = np.arange(n)
    return np.einsum("ki,ij,kj->k", _cosines(n), correlation ** np.abs(places[:, None] - places), _cosines(n))


def _bases(stride: int, channels: int) -> dict[int, Float[np.ndarray, "C t_s_s_3"]]:
    """The kept basis functions, each divided by its deviation, of blocks of one frame and of four.

    A frequency that is constant in time and kept in both has the same channel in both.
    """
    deviations, kept = {}, {}
    for t in (1, GROUP):
        space = _variances(stride, SPATIAL_CORRELATION)
        variances = np.einsum(
            "t,y,x,c->tyxc", _variances(t, TEMPORAL_CORRELATION), space, space, np.square(COLOUR_DEVIATIONS)
        )
        # Rounding ties what is equal by symmetry, and a stable sort resolves ties alike everywhere.
        order = np.argsort(-np.round(variances, 9), axis=None, kind="stable")[:channels]
        kept[t] = [tuple(map(int, place)) for place in np.argwhere(np.ones_like(variances))[order]]
        deviations[t] = np.sqrt(variances)
    common = [place for place in kept[GROUP] if place in kept[1]]
    bases = {}
    for t in (1, GROUP):
        places = common + [place for place in kept[t] if place not in common]
        rows = [
            np.einsum(
                "t,y,x,c->tyxc", _cosines(t)[k], _cosines(stride)[y], _cosines(stride)[x], _cosines(3)[c]
            ).reshape(-1)
            / deviations[t][k, y, x, c]
            for k, y, x, c in places
        ]
        bases[t] = np.stack(rows).astype(np.float32)
    return bases


class DCTCodec:
    """An `encoders.VideoCodec` that keeps the C strongest DCT coefficients of each block.

    Args:
      stride: side of a block, s: 4 or 8 pixels.
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
        # Rows are orthogonal but scaled, so the inverse divides by their squared lengths.
        self._inverses = {t: basis / np.square(basis).sum(1, keepdims=True) for t, basis in self._bases.items()}

    def describe(self) -> dict[str, Any]:
        """Returns what makes this codec again."""
        return {"name": "dct", "stride": self.stride, "channels": self.channels}

    def encode(self, videos: Float[np.ndarray, "B T h w 3"]) -> Float[np.ndarray, "B F H W C"]:
        """Encodes as `encoders.VideoCodec.encode` says."""
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
        """Decodes as `encoders.VideoCodec.decode` says."""
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


class WordHashes:
    """An `encoders.TextEncoder`: a fixed random vector a word, and one for the end.

    Words are what white space separates, in lower case and without punctuation at their ends.

    Args:
      width: of the vectors.

    Raises:
      ValueError: a width below 1.
    """

    def __init__(self, width: int = 256) -> None:
        if width < 1:
            raise ValueError(f"The word hashes' width is {width}; it must be at least 1.")
        self.width = width

    def describe(self) -> dict[str, Any]:
        """Returns what makes this encoder again."""
        return {"name": "words", "width": self.width}

    def encode(self, prompts: Sequence[str]) -> list[Float[np.ndarray, "S width"]]:
        """Encodes as `encoders.TextEncoder.encode` says; components have unit variance."""
        sentences = []
        for prompt in prompts:
            words = [word.strip(string.punctuation) for word in prompt.lower().split()]
            sentences.append([*[word for word in words if word][: MAX_TEXT_LENGTH - 1], ""])
        return [np.stack([self._vector(word) for word in words]) for words in sentences]

    def _vector(self, word: str) -> Float[np.ndarray, " width"]:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest(), "little")
        return np.random.default_rng(seed).standard_normal(self.width, np.float32)


class DAISY:
    """An `encoders.FeatureEncoder`: DAISY descriptors of the grey image at the patches' centres, and mean colours.

    A token is [descriptor, colour, 0.1]. The descriptor holds 13 histograms of 8 gradient directions, each less its
    mean, divided together by their length, or by a floor where there is hardly a gradient. The colour is the patch's
    mean RGB in [-1, 1] over √3. So texture and colour weigh alike in a cosine, and no token is zero.

    Args:
      patch_size: side of a patch in pixels, even.
    """

    RINGS, HISTOGRAMS, ORIENTATIONS = 2, 6, 8
    FLOOR = 0.05
    """Length below which a descriptor is scaled as if it had this one; gradients are of grey in [0, 1] a pixel."""

    def __init__(self, patch_size: int = 16) -> None:
        assert patch_size >= 2, patch_size
        assert patch_size % 2 == 0, patch_size
        self.patch_size = patch_size
        self.width = (self.RINGS * self.HISTOGRAMS + 1) * self.ORIENTATIONS + 4

    def describe(self) -> dict[str, Any]:
        """Returns what makes this encoder again."""
        return {"name": "daisy", "patch_size": self.patch_size, "width": self.width}

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Encodes as `encoders.FeatureEncoder.encode` says."""
        p = self.patch_size
        N, h, w, _ = images.shape
        if h % p or w % p:
            raise ValueError(f"Images are {h}x{w} pixels; DAISY on patches of {p} needs multiples of it.")
        features = np.zeros((N, h // p, w // p, self.width), np.float32)
        for image, out in zip(images.astype(np.float32), features, strict=True):
            histograms = self._histograms(image.mean(-1) / 2 + 0.5)
            histograms -= histograms.mean(-1, keepdims=True)
            descriptors = histograms.reshape(*out.shape[:2], -1)
            out[..., :-4] = descriptors / np.maximum(np.linalg.norm(descriptors, axis=-1, keepdims=True), self.FLOOR)
            out[..., -4:-1] = image.reshape(h // p, p, w // p, p, 3).mean((1, 3)) / np.sqrt(3)
            out[..., -1] = 0.1
        return features

    def _histograms(self, grey: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "rows columns histograms orientations"]:
        """DAISY on the grid of patch centres; the image goes on beyond its border as it is there."""
        p = self.patch_size
        radius = p
        # scikit-image begins at `radius` and stops at the first centre nearer than that to the other border.
        padding = (radius - p // 2, radius + p // 2)
        descriptors = daisy(
            np.pad(grey, (padding, padding), mode="edge"),
            step=p,
            radius=radius,
            rings=self.RINGS,
            histograms=self.HISTOGRAMS,
            orientations=self.ORIENTATIONS,
            normalization="off",
        )
        return descriptors.reshape(*descriptors.shape[:2], -1, self.ORIENTATIONS).astype(np.float32)
