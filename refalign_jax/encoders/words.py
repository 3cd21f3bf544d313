"""A `TextEncoder` that needs no weights, to try out and test everything that comes after UMT5.

Each word is a Gaussian vector seeded by the word's SHA-256, whatever its position. A vector for the end follows, so
that the empty prompt has an embedding too.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np

from refalign_jax.config import MAX_TEXT_LENGTH
from refalign_jax.types import Float


class WordHashes:
    """A `TextEncoder` that gives each word a fixed random vector, followed by one for the end.

    Words are separated by white space, turned into lower case and stripped of punctuation at their ends.

    Args:
      width: width of the vectors.

    Raises:
      ValueError: a width below 1.
    """

    def __init__(self, width: int = 256) -> None:
        if width < 1:
            raise ValueError(f"The word hashes' width is {width}; it must be at least 1.")
        self.width = width

    def describe(self) -> dict[str, Any]:
        """Returns JSON that identifies the encoder."""
        return {"name": "words", "width": self.width}

    def encode(self, prompts: Sequence[str]) -> list[Float[np.ndarray, "S width"]]:
        """Embeds prompts as `TextEncoder.encode` specifies; components have unit variance."""
        sentences = [[*_words(prompt)[: MAX_TEXT_LENGTH - 1], ""] for prompt in prompts]
        return [np.stack([self._vector(word) for word in words]) for words in sentences]

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Counts words and the end, as `TextEncoder.count_tokens` specifies."""
        return [len(_words(prompt)) + 1 for prompt in prompts]

    def release(self) -> None:
        """Frees nothing, as there are no parameters."""

    def _vector(self, word: str) -> Float[np.ndarray, " width"]:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest(), "little")
        return np.random.default_rng(seed).standard_normal(self.width, np.float32)


def _words(prompt: str) -> list[str]:
    """Splits a prompt."""
    words = [word.strip(string.punctuation) for word in prompt.lower().split()]
    return [word for word in words if word]
