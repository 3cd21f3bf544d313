"""Examples of random numbers in any shape, for performance work without data.

Every array is a slice of one pool of Gaussian numbers, at an offset that depends on index and field. So an example
costs no more than a read from memory and is the same in every process.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import ml_dtypes
import numpy as np

from refalign_jax.data.examples import MASK, Spec
from refalign_jax.digests import digest_json

_OFFSETS = 65_537
"""Number of distinct starts in the pool; a prime, so that steps of any size visit all of them."""


class SyntheticSource:
    """Random access to examples made from (seed, index), in bfloat16; implements `loader.Source`.

    Args:
      spec: number and shapes of the examples. Every example has `spec.longest_text` text tokens and
        `spec.most_references` references, each a subject of its own that fills the image.
      seed: seed of the pool.
    """

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        self.spec, self._seed = spec, seed
        R, (F, H, W, C) = spec.most_references, spec.video_latents
        self._shapes = {
            "video_latents": (F, H, W, C),
            "reference_latents": (R, H, W, C),
            "text": (spec.longest_text, spec.text_width),
            "vfm_features": (R, spec.vfm_tokens, spec.vfm_width),
        }

    @functools.cached_property
    def _pool(self) -> np.ndarray:
        size = max(math.prod(shape) for shape in self._shapes.values()) + _OFFSETS
        return np.random.default_rng(self._seed).standard_normal(size, np.float32).astype(ml_dtypes.bfloat16)

    def __len__(self) -> int:
        return self.spec.num_examples

    def __getitem__(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Returns arrays and metadata in the form of `examples.parse`; the arrays are views of the pool."""
        spec = self.spec
        arrays: dict[str, np.ndarray] = {"subject_ids": np.arange(spec.most_references, dtype=np.int32)}
        for field, (name, shape) in enumerate(self._shapes.items()):
            start = (40_503 * (4 * index + field)) % _OFFSETS
            arrays[name] = self._pool[start : start + math.prod(shape)].reshape(shape)
        if spec.subject_mask:
            arrays[MASK] = np.ones((spec.most_references, spec.vfm_tokens), np.uint8)
        return arrays, {"id": f"synthetic-{index:08d}", "prompt": "", "metadata": {"synthetic": True}}

    def identity(self, count: int) -> str:
        """Returns a text that seed and shapes decide, whatever the number of examples."""
        del count
        return digest_json([self._seed, self._shapes])
