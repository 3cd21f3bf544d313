"""Small random examples, shared by the tests of data."""

import dataclasses

import numpy as np

from refalign_jax.config import Storage
from refalign_jax.data.examples import Example

FLOAT32 = Storage(video_latents="float32", reference_latents="float32", text="float32", vfm_features="float32")


def make(seed=0, references=2, text=5, metadata=None, **changes):
    rng = np.random.default_rng(seed)
    fields = {
        "video_latents": (2, 4, 6, 3),
        "reference_latents": (references, 4, 6, 3),
        "text": (text, 8),
        "vfm_features": (references, 6, 7),
    }
    arrays = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in fields.items()}
    arrays["subject_ids"] = np.arange(references, dtype=np.int32)[::-1].copy()
    return Example(id=f"e{seed}", prompt="ein Hund läuft", metadata=metadata or {}, **(arrays | changes))


def assert_same(a, b, **tolerance):
    for field in dataclasses.fields(Example):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            assert x.shape == y.shape
            np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), **tolerance)
        else:
            assert x == y
