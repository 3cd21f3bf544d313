"""Random numbers that an id and a seed decide, whatever is drawn beside them."""

from __future__ import annotations

import hashlib

import numpy as np


def random_of(id: str, seed: int) -> np.random.Generator:
    """Returns a generator of random numbers that depends on an id and a seed alone."""
    digest = hashlib.sha256(id.encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest, np.uint32).tolist()])
