"""DAISY: its grid, and whether it tells subjects apart."""

import numpy as np
import pytest
from support.footage import SUBJECTS, photograph

from refalign_jax.data.video import to_float
from refalign_jax.encoders.daisy import DAISY


def test_daisy_lies_on_the_patches():
    daisy = DAISY(8)
    image = to_float(photograph("cat"))[None]
    features = daisy.encode(image)
    assert features.shape == (1, 12, 16, daisy.width)
    moved = daisy.encode(np.roll(image, (8, -16), (1, 2)))
    inside = np.abs(moved[0, 3:-2, 2:-4] - features[0, 2:-3, 4:-2])
    assert inside.mean() < 1e-3  # the smoothing sees a little of the border
    for dy, dx in ((0, 1), (1, 0)):  # and not half a patch beside them
        half = daisy.encode(np.roll(image, (4 * dy, 4 * dx), (1, 2)))
        assert np.abs(half - features).mean() > 0.01


def test_daisy_tells_subjects_apart_and_no_token_is_zero():
    daisy = DAISY(8)
    first, later = ([to_float(photograph(n)[16:80, x : x + 96])[None] for n in SUBJECTS] for x in (0, 8))
    tokens = [
        np.concatenate([daisy.encode(x)[0].reshape(-1, daisy.width) for x in images]) for images in (first, later)
    ]
    a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in tokens)
    subject = np.repeat(np.arange(len(SUBJECTS)), len(a) // len(SUBJECTS))
    assert (subject[(a @ b.T).argmax(0)] == subject).mean() > 0.9
    for grey in (-1, 0, 1):
        blank = daisy.encode(np.full((1, 16, 16, 3), grey, np.float32))
        assert np.linalg.norm(blank, axis=-1).min() > 0.09
    with pytest.raises(ValueError, match="multiples"):
        daisy.encode(np.zeros((1, 12, 16, 3)))
