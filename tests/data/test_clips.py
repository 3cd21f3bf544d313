"""Choice of frames and their size."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.footage import photograph

from refalign_jax.data.clips import choose_frames, resize_and_crop


@given(st.integers(1, 200), st.integers(0, 20), st.integers(1, 5), st.integers(0, 9))
def test_frames_are_inside_distinct_and_ascending(available, k, stride, seed):
    num_frames = 4 * k + 1
    frames = choose_frames(available, num_frames, stride, np.random.default_rng(seed))
    if available < num_frames:
        assert frames is None
        return
    assert len(frames) == num_frames
    assert 0 <= frames[0] <= frames[-1] < available
    steps = np.diff(frames)
    assert (steps >= 1).all()
    if available >= (num_frames - 1) * stride + 1:
        assert (steps == stride).all()
    elif num_frames > 1:
        assert (frames[0], frames[-1]) == (0, available - 1)
        assert np.ptp(steps) <= 1


def test_every_start_is_drawn():
    rng = np.random.default_rng(0)
    assert {int(choose_frames(15, 5, 3, rng)[0]) for _ in range(100)} == {0, 1, 2}


@pytest.mark.parametrize(("height", "width"), [(48, 48), (32, 128), (192, 64), (96, 128)])
def test_the_centre_is_kept_and_nothing_is_stretched(height, width):
    frames = photograph("cat")[None]
    out = resize_and_crop(frames, height, width)
    assert out.shape == (1, height, width, 3)
    scale = max(height / 96, width / 128)
    y, x = np.mgrid[:height, :width]
    rows = np.clip(((y + 0.5 - height / 2) / scale + 48).astype(int), 0, 95)
    columns = np.clip(((x + 0.5 - width / 2) / scale + 64).astype(int), 0, 127)
    assert np.corrcoef(out[0].ravel(), frames[0, rows, columns].ravel())[0, 1] > 0.95


def test_frames_of_the_right_size_are_untouched():
    frames = photograph("cat")[None]
    assert resize_and_crop(frames, 96, 128) is frames
