"""A `FeatureEncoder` that needs no weights, to try out and test everything that comes after DINOv3.

It computes DAISY descriptors (Tola et al. 2010): histograms of gradients around the centre of each patch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refalign_jax.types import Float


class DAISY:
    """A `FeatureEncoder`: DAISY descriptors of the grey image at the centres of the patches, and mean colours.

    A token is [descriptor, colour, 0.1]. The descriptor consists of 13 histograms of 8 gradient directions; each has
    its mean subtracted, and all are divided by their common length, or by `FLOOR` where there is hardly a gradient. The
    colour is the patch's mean RGB in [-1, 1], divided by √3. So texture and colour have equal weight in a cosine, and
    no token is zero.

    Args:
      patch_size: side of a patch in pixels, even.
    """

    RINGS, HISTOGRAMS, ORIENTATIONS = 2, 6, 8
    FLOOR = 0.05
    """Smallest length by which a descriptor is divided; gradients are of grey values in [0, 1], per pixel."""

    def __init__(self, patch_size: int = 16) -> None:
        assert patch_size >= 2, patch_size
        assert patch_size % 2 == 0, patch_size
        self.patch_size = patch_size
        self.width = (self.RINGS * self.HISTOGRAMS + 1) * self.ORIENTATIONS + 4

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        return {"name": "daisy", "patch_size": self.patch_size, "width": self.width}

    def encode(self, images: Float[np.ndarray, "N h w 3"]) -> Float[np.ndarray, "N rows columns E"]:
        """Computes features as `FeatureEncoder.encode` specifies."""
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
        """Returns DAISY on the grid of patch centres; the image is continued beyond its border by its edge pixels."""
        from skimage.feature import daisy  # slow to import, and no part of training

        p = self.patch_size
        radius = p
        # scikit-image takes centres from `radius` on and stops `radius` before the far border.
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
