"""The loop over chunks and tiles, with steps simple enough to know the answer."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refalign_jax.models.streaming import Tiling, cut_axis, stream


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_weights_of_an_axis_sum_to_one(cells, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    unit = data.draw(st.sampled_from([1, 8]))
    starts, weights = cut_axis(cells, tile, overlap, unit)
    total = np.zeros(cells * unit)
    for start, weight in zip(starts, weights, strict=True):
        total[start * unit : start * unit + len(weight)] += weight
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert weights.min() > 0
    assert all(later - earlier <= tile - overlap for earlier, later in itertools.pairwise(starts))


def test_overlaps_are_blended_linearly():
    starts, weights = cut_axis(14, 8, 2, 2)
    np.testing.assert_array_equal(starts, [0, 6])
    np.testing.assert_allclose(weights[0, -4:], [0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(weights[1, :4], [0.125, 0.375, 0.625, 0.875])


def mean_of_cells(chunk, cache, first):
    """4 frames and 2×2 pixels to their mean, plus the number of chunks before: a known encoder."""
    B, t, h, w, c = chunk.shape
    seen = jnp.zeros(()) if first else cache["seen"]
    return chunk.reshape(B, 1, t, h // 2, 2, w // 2, 2, c).mean((2, 4, 6)) + seen, {"seen": seen + 1}


@pytest.mark.parametrize("tiling", [None, Tiling(size=8, overlap=4), Tiling(size=4, overlap=0)])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_step_that_sees_one_cell_gives_the_same_in_tiles(tiling, chunks):
    video = np.random.default_rng(0).normal(size=(2, 1 + 4 * chunks, 14, 20, 3)).astype(np.float32)
    found = stream(mean_of_cells, video, (2, 1 + chunks, 7, 10, 3), frames=(4, 1), cells=(2, 1), tiling=tiling)
    cells = video.reshape(2, -1, 7, 2, 10, 2, 3).mean((3, 5))
    expected = np.concatenate([cells[:, :1], cells[:, 1:].reshape(2, chunks, 4, 7, 10, 3).mean(2)], axis=1)
    expected += np.arange(1 + chunks).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def repeat(latent, cache, first):
    """A known decoder: each cell becomes 2×2 pixels of 4 frames."""
    frames = jnp.repeat(latent, 1 if first else 4, axis=1)
    return jnp.repeat(jnp.repeat(frames, 2, axis=2), 2, axis=3), cache


@pytest.mark.parametrize("tiling", [None, Tiling(size=8, overlap=4)])
def test_decoding_writes_every_frame_and_pixel(tiling):
    latents = np.random.default_rng(0).normal(size=(1, 3, 7, 10, 2)).astype(np.float32)
    found = stream(repeat, latents, (1, 9, 14, 20, 2), frames=(1, 4), cells=(1, 2), tiling=tiling)
    expected = latents[:, [0, 1, 1, 1, 1, 2, 2, 2, 2]].repeat(2, axis=2).repeat(2, axis=3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
